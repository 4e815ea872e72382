//! A copy proven in part: chunks drawn at random from those a manifest lists, and what their being right says of the
//! others.

use std::fmt;
use std::iter::Peekable;
use std::str::FromStr;
use std::sync::atomic::AtomicBool;
use std::sync::{Mutex, PoisonError};

use super::verify::{self, Task, Verdict};
use super::{Chunks, Manifest};
use crate::error::{Error, Kind, Result};
use crate::io::ReadAt;
use crate::unit::{Digest, Extent};

/// A share of a whole, exactly: 1 to 1,000,000 millionths.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Share(u32);

/// The whole, in millionths.
const WHOLE: u32 = 1_000_000;

impl Share {
    /// It, in millionths.
    pub const fn millionths(self) -> u32 {
        self.0
    }

    /// How many of `n` things it is, rounded up.
    pub fn of(self, n: u64) -> u64 {
        let exact = (u128::from(n) * u128::from(self.0)).div_ceil(u128::from(WHOLE));
        u64::try_from(exact).unwrap_or(n)
    }
}

impl fmt::Display for Share {
    /// As a percentage with as many decimals as it needs.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let text = format!("{}.{:04}", self.0 / 10_000, self.0 % 10_000);
        write!(f, "{} %", text.trim_end_matches('0').trim_end_matches('.'))
    }
}

impl FromStr for Share {
    type Err = Error;

    /// Reads `1%`, `0.5%` with up to four decimals, or `10000ppm`.
    fn from_str(text: &str) -> Result<Self> {
        let bad = |why: &str| {
            Error::new(Kind::Usage, "usage.share", format!("{text:?} is no share of a whole"))
                .because(why)
                .remedy("write a percentage such as 1% or 0.5%, or millionths such as 500ppm")
        };
        let digits = |text: &str| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
        let number = |text: &str| text.parse::<u64>().map_err(|_| bad("the number is too large"));
        let millionths = if let Some(percent) = text.strip_suffix('%') {
            let (whole, decimals) = percent.split_once('.').unwrap_or((percent, "0"));
            if !digits(whole) || !digits(decimals) {
                return Err(bad("it is not a number"));
            }
            if decimals.len() > 4 {
                return Err(bad("it has more than four decimals"));
            }
            let decimals = number(&format!("{decimals:0<4}"))?;
            number(whole)?.checked_mul(10_000).and_then(|whole| whole.checked_add(decimals))
        } else if let Some(millionths) = text.strip_suffix("ppm") {
            if !digits(millionths) {
                return Err(bad("it is not a number"));
            }
            Some(number(millionths)?)
        } else {
            return Err(bad("it has no unit"));
        };
        let millionths = millionths.and_then(|n| u32::try_from(n).ok()).filter(|n| *n <= WHOLE);
        match millionths {
            None => Err(bad("it is more than the whole")),
            Some(0) => Err(bad("it is nothing")),
            Some(n) => Ok(Share(n)),
        }
    }
}

/// A stream of random numbers that a seed decides: BLAKE3's extended output over the seed, so that the same seed draws
/// the same sample in every version of haul.
struct Stream(blake3::OutputReader);

impl Stream {
    fn new(seed: u64) -> Self {
        let mut hasher = blake3::Hasher::new_derive_key("haul 2026 sample of a manifest's chunks");
        hasher.update(&seed.to_le_bytes());
        Stream(hasher.finalize_xof())
    }

    /// A number below `n`, each as likely as the others. `n` is not 0.
    fn below(&mut self, n: u64) -> u64 {
        // The largest multiple of n: numbers beyond it would make the small ones likelier.
        let fair = u64::MAX - u64::MAX % n;
        loop {
            let mut bytes = [0; 8];
            self.0.fill(&mut bytes);
            let number = u64::from_le_bytes(bytes);
            if number < fair {
                return number % n;
            }
        }
    }
}

/// Draws without replacement, in order: of `total` things `wanted`, each set of that size as likely as any other
/// (Knuth, The Art of Computer Programming, volume 2, 3.4.2, algorithm S).
struct Draw {
    stream: Stream,
    total: u64,
    wanted: u64,
}

impl Draw {
    fn new(seed: u64, total: u64, wanted: u64) -> Self {
        Draw { stream: Stream::new(seed), total, wanted: wanted.min(total) }
    }

    /// Whether the next thing is drawn.
    fn next(&mut self) -> bool {
        if self.total == 0 {
            return false;
        }
        let drawn = self.wanted > 0 && self.stream.below(self.total) < self.wanted;
        self.total -= 1;
        self.wanted -= u64::from(drawn);
        drawn
    }
}

/// The smallest number of bad things among `total` of which a sample of `drawn` has at least one with a probability of
/// 99 % or more; `None` when nothing was drawn.
///
/// With `d` bad things the sample has none with the hypergeometric probability C(total - d, drawn) / C(total, drawn),
/// which is computed in fixed point with 64 bits behind the point, every step rounded up. So the answer is never too
/// small; it is one too large only where the exact probability is within 2^-40 of 1 %. `total` is at most 2^32.
pub fn found_from(total: u64, drawn: u64) -> Option<u64> {
    if drawn == 0 || drawn > total {
        return None;
    }
    let one = 1_u128 << 64;
    let limit = one / 100;
    let mut missed = one;
    for bad in 1..=total {
        // One more bad thing: it too is among those not drawn.
        let (unread, left) = (total - drawn, total - (bad - 1));
        let rest = u128::from(unread.saturating_sub(bad - 1));
        missed = (missed * rest).div_ceil(u128::from(left));
        if missed <= limit {
            return Some(bad);
        }
    }
    Some(total)
}

/// What to draw.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// How much of the listed chunks, rounded up to whole chunks.
    pub share: Share,
    /// Decides which.
    pub seed: u64,
}

/// What was drawn, and what was found in it.
#[derive(Debug)]
pub struct Sampled {
    /// What differs, and how much was read.
    pub verdict: Verdict,
    /// Chunks that were drawn and read.
    pub drawn: u64,
    /// Chunks that the manifest lists.
    pub listed: u64,
    /// How many bad chunks such a sample does not miss: see [`found_from`].
    pub found_from: Option<u64>,
}

/// Hands out what was drawn: chunks next to each other together, up to a batch.
struct Tasks<'a> {
    chunks: Peekable<Drawn>,
    manifest: &'a Manifest,
}

/// The chunks that were drawn.
struct Drawn {
    chunks: Chunks,
    draw: Draw,
}

impl Iterator for Drawn {
    type Item = Result<(u64, Digest)>;

    fn next(&mut self) -> Option<Self::Item> {
        loop {
            let entry = self.chunks.next()?;
            if entry.is_err() || self.draw.next() {
                return Some(entry);
            }
        }
    }
}

impl Tasks<'_> {
    fn next(&mut self) -> Result<Option<Task>> {
        let geometry = self.manifest.geometry();
        let Some(first) = self.chunks.next().transpose()? else { return Ok(None) };
        let mut extent = geometry.chunk_at(first.0);
        let end = geometry.batch_at(extent.start).end;
        let mut digests = vec![first];
        let mut index = first.0;
        while extent.end < end
            && let Some(entry) =
                self.chunks.next_if(|entry| matches!(entry, Ok((next, _)) if *next == index + 1))
        {
            let (next, digest) = entry?;
            index = next;
            extent = Extent::new(extent.start, geometry.chunk_at(index).end);
            digests.push((index, digest));
        }
        Ok(Some(Task { extent, digests }))
    }
}

/// Reads a sample of the chunks that `manifest` lists from `copy`, in the order of the disk, with `threads` threads, and
/// compares it; nothing else of the copy is read. `advance` is told, from any thread, how far it has come.
pub fn verify(
    manifest: &Manifest,
    copy: &dyn ReadAt,
    options: Options,
    threads: usize,
    stop: &AtomicBool,
    advance: &(dyn Fn(u64) + Sync),
) -> Result<Sampled> {
    let geometry = manifest.geometry();
    verify::check_size(manifest, copy)?;
    let mut listed = 0;
    for entry in manifest.chunks()? {
        entry?;
        listed += 1;
    }
    let drawn = options.share.of(listed);
    let draw = Draw::new(options.seed, listed, drawn);
    let chunks = Drawn { chunks: manifest.chunks()?, draw }.peekable();
    let tasks = Mutex::new(Tasks { chunks, manifest });
    let next = || tasks.lock().unwrap_or_else(PoisonError::into_inner).next();
    let verdict = verify::read(&geometry, copy, &next, threads, stop, advance)?;
    Ok(Sampled { verdict, drawn, listed, found_from: found_from(listed, drawn) })
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;

    fn drawn(seed: u64, total: u64, wanted: u64) -> Vec<u64> {
        let mut draw = Draw::new(seed, total, wanted);
        (0..total).filter(|_| draw.next()).collect()
    }

    #[test]
    fn shares_are_exact() {
        for (text, millionths) in [
            ("1%", 10_000),
            ("0.5%", 5000),
            ("0.0001%", 1),
            ("100%", WHOLE),
            ("100.0000%", WHOLE),
            ("33.3%", 333_000),
            ("10000ppm", 10_000),
            ("1ppm", 1),
        ] {
            assert_eq!(text.parse::<Share>().unwrap().millionths(), millionths, "{text}");
        }
        for text in [
            "",
            "%",
            "ppm",
            "1",
            "0%",
            "0.0%",
            "0ppm",
            "100.0001%",
            "101%",
            "1000001ppm",
            "-1%",
            "+1%",
            ".5%",
            "1.%",
            "1.00000%",
            "1e1%",
            "99999999999999999999%",
            "1.2.3%",
            "1 %",
        ] {
            assert_eq!(text.parse::<Share>().unwrap_err().id(), "usage.share", "{text}");
        }
        let share = |text: &str| text.parse::<Share>().unwrap();
        assert_eq!((share("1%").of(1), share("1%").of(100), share("1%").of(101)), (1, 1, 2));
        assert_eq!(
            (share("100%").of(12_345), share("1ppm").of(0), share("1ppm").of(u64::MAX)),
            (12_345, 0, 18_446_744_073_710)
        );
        assert_eq!((share("0.5%").to_string(), share("100%").to_string()), ("0.5 %".into(), "100 %".into()));
    }

    proptest! {
        #[test]
        fn a_sample_has_the_size_asked_for_and_a_seed_decides_it(
            seed: u64, total in 0..5000_u64, millionths in 1..=WHOLE,
        ) {
            let wanted = Share(millionths).of(total);
            let sample = drawn(seed, total, wanted);
            // The smallest whole number that is no less than the share.
            prop_assert!(wanted * 1_000_000 >= total * u64::from(millionths));
            prop_assert!(wanted == 0 || (wanted - 1) * 1_000_000 < total * u64::from(millionths));
            prop_assert_eq!(sample.len() as u64, wanted);
            prop_assert_eq!(&sample, &drawn(seed, total, wanted));
            prop_assert!(sample.is_sorted_by(|a, b| a < b));
        }
    }

    #[test]
    fn every_set_is_as_likely_as_any_other() {
        // 20 sets of 3 of 6, drawn 20,000 times: chi-squared with 19 degrees of freedom is above 50 once in 7,000 tries.
        let mut counts: BTreeMap<Vec<u64>, f64> = BTreeMap::new();
        for seed in 0..20_000 {
            *counts.entry(drawn(seed, 6, 3)).or_default() += 1.0;
        }
        assert_eq!(counts.len(), 20);
        let chi: f64 = counts.values().map(|count| (count - 1000.0).powi(2) / 1000.0).sum();
        assert!(chi < 50.0, "chi-squared {chi}");
    }

    #[test]
    fn the_same_seed_draws_the_same_in_every_version() {
        assert_eq!(drawn(1, 1000, 8), [72, 201, 424, 552, 603, 710, 922, 946]);
    }

    /// How many of all samples of `drawn` of `total` things miss the first `bad`, and how many there are: by looking at
    /// each.
    fn misses(total: u32, drawn: u32, bad: u32) -> (u64, u64) {
        let samples = (0..1_u32 << total).filter(|sample| sample.count_ones() == drawn);
        samples.fold((0, 0), |(missed, all), sample| {
            (missed + u64::from(sample & ((1 << bad) - 1) == 0), all + 1)
        })
    }

    #[test]
    fn the_confidence_is_that_of_all_samples() {
        for total in 1..=14 {
            for drawn in 1..=total {
                let exact = (1..=total).find(|bad| {
                    let (missed, all) = misses(total, drawn, *bad);
                    missed * 100 <= all
                });
                let exact = exact.unwrap();
                assert_eq!(found_from(total.into(), drawn.into()), Some(exact.into()), "{drawn} of {total}");
            }
        }
    }

    #[test]
    fn the_confidence_of_large_samples_is_on_the_safe_side() {
        for (total, drawn, expected) in [
            // Nothing unread; all but one; exactly 1 % is missed, which rounding calls more.
            (4_000_000, 4_000_000, 1),
            (4_000_000, 3_999_999, 1),
            (100, 99, 2),
            (1000, 10, 368),
            (1, 1, 1),
        ] {
            assert_eq!(found_from(total, drawn), Some(expected), "{drawn} of {total}");
        }
        assert_eq!((found_from(10, 0), found_from(0, 0)), (None, None));
        // By logarithms of factorials, in floating point.
        let ln_factorial = |n: u64| (1..=n).map(|i| (i as f64).ln()).sum::<f64>();
        for (total, drawn) in [(4096, 41), (65_536, 656), (65_536, 7), (200_000, 20_000)] {
            let ln_missed = |bad: u64| {
                ln_factorial(total - bad) + ln_factorial(total - drawn)
                    - ln_factorial(total - drawn - bad)
                    - ln_factorial(total)
            };
            let bad = found_from(total, drawn).unwrap();
            assert!(ln_missed(bad) <= 0.01_f64.ln() + 1e-6, "{drawn} of {total}");
            assert!(ln_missed(bad - 1) > 0.01_f64.ln() - 1e-6, "{drawn} of {total}");
        }
    }
}
