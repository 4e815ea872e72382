//! Changes to an input: bits, bytes and numbers of consequence, pieces of itself and of others, its length, its pages.

use super::bodies::input::{HEAD, MAGIC, PAGE, is_packed};
use super::images::Random;

/// Longest input, in bytes.
pub const LONGEST: usize = 400 << 10;

/// Makes an input out of one of `corpus`, the newer ones more often.
pub fn next(corpus: &[Vec<u8>], random: &mut Random) -> Vec<u8> {
    let first = if random.below(2) == 0 { 0 } else { corpus.len() * 3 / 4 };
    let mut input = corpus[first + below(random, corpus.len() - first)].clone();
    for _ in 0..1 << random.below(4) {
        let other = &corpus[below(random, corpus.len())];
        mutate(&mut input, other, random);
    }
    input.truncate(LONGEST);
    input
}

/// A number below `n`, 0 if there is none.
fn below(random: &mut Random, n: usize) -> usize {
    usize::try_from(random.below(n as u64)).unwrap()
}

/// A number of consequence in an input, or in a file, of so many bytes.
fn interesting(random: &mut Random, len: u64) -> u64 {
    let shift = random.below(64);
    let base = match random.below(10) {
        0 => 0,
        1 => 1,
        2 => u64::MAX,
        3 => len,
        4 => len / 512,
        5 => len / 4096,
        6 => random.next() >> shift,
        7 => random.below(256),
        _ => 1 << shift,
    };
    match random.below(4) {
        0 => base.wrapping_sub(1),
        1 => base.wrapping_add(1),
        2 => base.wrapping_neg(),
        _ => base,
    }
}

fn mutate(input: &mut Vec<u8>, other: &[u8], random: &mut Random) {
    if input.is_empty() {
        input.extend(other);
        return;
    }
    let packed = is_packed(input);
    let at = below(random, input.len());
    match random.below(if packed { 13 } else { 15 }) {
        0 | 1 => input[at] ^= 1 << random.below(8),
        2 => input[at] = [0, 1, 0x7f, 0x80, 0xff, b'0', b'9', b' ', b'\n', b'"'][below(random, 10)],
        3..=5 => number(input, at, random),
        6 => random.fill(input[at..].chunks_mut(8).next().unwrap()),
        7 | 8 => {
            // A piece of the input comes elsewhere, mostly where fields are.
            let unit = [1, 2, 4, 8, 16][below(random, 5)];
            let from = below(random, input.len()) / unit * unit;
            let len = (unit * (1 + below(random, 8))).min(input.len() - from);
            let piece = input[from..from + len].to_vec();
            overwrite(input, at / unit * unit, &piece);
        }
        9 => {
            // What another input has at this place, or anywhere.
            let from = if random.below(2) == 0 { at } else { below(random, other.len()) };
            let piece = other.get(from..).unwrap_or_default();
            let len = (1usize << random.below(10)).min(piece.len());
            overwrite(input, at, &piece[..len]);
        }
        10 => {
            let len = (1usize << random.below(10)).min(input.len() - at);
            input[at..at + len].fill([0, 0xff][below(random, 2)]);
        }
        11 if !packed => text(input, at, random),
        _ if packed => pages(input, other, random),
        12 => {
            let len = (1usize << random.below(12)).min(input.len() - at);
            input.drain(at..at + len);
        }
        13 => {
            let len = (1usize << random.below(10)).min(input.len() - at);
            let piece = input[at..at + len].to_vec();
            let to = if random.below(2) == 0 { at } else { below(random, input.len()) };
            input.splice(to..to, piece);
        }
        _ => match random.below(3) {
            0 => input.truncate(at),
            1 => input.truncate(input.len() - below(random, 1024).min(input.len())),
            _ => {
                let piece = other.get(at..).unwrap_or_default();
                input.truncate(at);
                input.extend(piece);
            }
        },
    }
}

fn overwrite(input: &mut [u8], at: usize, bytes: &[u8]) {
    for (to, from) in input.iter_mut().skip(at).zip(bytes) {
        *to = *from;
    }
}

/// A number of 1 to 8 bytes becomes another one, or a little more or less.
fn number(input: &mut [u8], at: usize, random: &mut Random) {
    let width = 1usize << random.below(4);
    let at = if random.below(4) == 0 { at } else { at / width * width };
    let big = random.below(2) == 0;
    let Some(field) = input.get(at..at + width) else { return };
    let mut bytes = [0; 8];
    let old = if big {
        bytes[8 - width..].copy_from_slice(field);
        u64::from_be_bytes(bytes)
    } else {
        bytes[..width].copy_from_slice(field);
        u64::from_le_bytes(bytes)
    };
    let new = match random.below(4) {
        0 => old.wrapping_add(random.below(16)).wrapping_sub(8),
        1 => old ^ 1 << random.below(8 * width as u64),
        _ => interesting(random, input.len() as u64),
    };
    let new = if big { (new << (64 - 8 * width)).to_be_bytes() } else { new.to_le_bytes() };
    overwrite(input, at, &new[..width]);
}

/// The digits at or after `at` become another number, or the line another one.
fn text(input: &mut Vec<u8>, at: usize, random: &mut Random) {
    if random.below(3) == 0 {
        let starts: Vec<usize> = (0..input.len()).filter(|i| *i == 0 || input[i - 1] == b'\n').collect();
        let line = |i: usize| starts[i]..starts.get(i + 1).copied().unwrap_or(input.len());
        let (from, to) = (line(below(random, starts.len())), line(below(random, starts.len())));
        let words = input[from].to_vec();
        let to = if random.below(2) == 0 { to.start..to.start } else { to };
        input.splice(to, words);
        return;
    }
    let Some(start) = input[at..].iter().position(u8::is_ascii_digit).map(|i| at + i) else { return };
    let end =
        input[start..].iter().position(|byte| !byte.is_ascii_digit()).map_or(input.len(), |i| start + i);
    let new = interesting(random, input.len() as u64);
    let words = if random.below(4) == 0 { format!("{new:o}") } else { new.to_string() };
    if random.below(2) == 0 {
        // As many digits as before: fields of tar and cpio have a width.
        overwrite(&mut input[start..end], 0, format!("{words:0>width$}", width = end - start).as_bytes());
    } else {
        input.splice(start..end, words.into_bytes());
    }
}

/// The file becomes longer or shorter, or a page goes, comes, or lies elsewhere.
fn pages(input: &mut Vec<u8>, other: &[u8], random: &mut Random) {
    let count = (input.len() - HEAD) / (HEAD + PAGE);
    let place = |i: usize| HEAD + i * (HEAD + PAGE);
    if count == 0 || random.below(3) == 0 {
        let size = u64::from_le_bytes(input[8..16].try_into().unwrap());
        let size = match random.below(5) {
            0 => size.wrapping_sub(random.below(8192)),
            1 => size.wrapping_add(random.below(8192)),
            2 => size / 2,
            3 => size.wrapping_add(1 << random.below(32)),
            _ => random.below(size),
        };
        input[8..16].copy_from_slice(&size.to_le_bytes());
        return;
    }
    let at = place(below(random, count));
    match random.below(4) {
        0 => {
            input.drain(at..at + HEAD + PAGE);
        }
        1 => {
            let to = place(below(random, count));
            let number = input[to..to + 8].to_vec();
            overwrite(input, at, &number);
        }
        2 if other.starts_with(MAGIC) && other.len() >= HEAD + HEAD + PAGE => {
            let from = HEAD + below(random, (other.len() - HEAD) / (HEAD + PAGE)) * (HEAD + PAGE);
            input.extend(&other[from..from + HEAD + PAGE]);
        }
        _ => {
            let page = input[at..at + HEAD + PAGE].to_vec();
            let number = u64::from_le_bytes(page[..8].try_into().unwrap()).wrapping_add(1 << random.below(8));
            input.extend(number.to_le_bytes());
            input.extend(&page[8..]);
        }
    }
}
