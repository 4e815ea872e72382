//! How the fuzzer writes down a file: as it is, or, where most of it is zeroes, by the pages that are not.
//!
//! ```text
//! "haulpage" | u64 LE length of the file | page …      page: u64 LE number | 8 bytes of 0 | 4096 bytes
//! ```
//! Any bytes are such a file: of pages with the same number the last counts, those beyond the end do not.

use std::collections::BTreeMap;
use std::fs::File;
use std::os::unix::fs::FileExt;

use haul::io::fake::MemoryDisk;
use haul::io::{WriteAt, is_zero};

pub const MAGIC: &[u8; 8] = b"haulpage";
/// Bytes before the first page, and before the bytes of each page.
pub const HEAD: usize = 16;
/// Bytes of a page.
pub const PAGE: usize = 4096;
/// Longest file: longer ones would only be longer.
const LONGEST: u64 = 1 << 42;

/// Whether `input` is written down by its pages.
pub fn is_packed(input: &[u8]) -> bool {
    input.len() >= HEAD && input.starts_with(MAGIC)
}

/// `file` by those of its pages that hold data.
pub fn pack(file: &[u8]) -> Vec<u8> {
    let mut input = [&MAGIC[..], &(file.len() as u64).to_le_bytes()].concat();
    for (number, page) in file.chunks(PAGE).enumerate().filter(|(_, page)| !is_zero(page)) {
        input.extend((number as u64).to_le_bytes());
        input.extend([0; 8]);
        input.extend(page);
        input.resize(input.len() + PAGE - page.len(), 0);
    }
    input
}

/// A file written down as `input`, to be read and changed where it is.
pub struct View<'a> {
    input: &'a mut [u8],
    /// Where each page is; none if the input is the file.
    pages: Option<BTreeMap<u64, usize>>,
    size: u64,
}

impl<'a> View<'a> {
    pub fn new(input: &'a mut [u8]) -> Self {
        if !is_packed(input) {
            return View { size: input.len() as u64, input, pages: None };
        }
        let number = |at: usize| u64::from_le_bytes(input[at..at + 8].try_into().unwrap());
        let size = number(8).min(LONGEST);
        let places = (HEAD..).step_by(HEAD + PAGE).take_while(|at| at + HEAD < input.len());
        let pages = places.map(|at| (number(at), at + HEAD)).collect();
        View { input, pages: Some(pages), size }
    }

    /// Length of the file.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Where the input has bytes of the file: offset in the file, place in the input, how many.
    pub fn pieces(&self) -> Vec<(u64, usize, usize)> {
        let Some(pages) = &self.pages else { return vec![(0, 0, self.input.len())] };
        let page = |(number, at): (&u64, &usize)| {
            let offset = number.checked_mul(PAGE as u64).filter(|offset| *offset < self.size)?;
            let len = PAGE.min(self.input.len() - at);
            let len = usize::try_from(self.size - offset).map_or(len, |left| left.min(len));
            Some((offset, *at, len))
        };
        pages.iter().filter_map(page).collect()
    }

    /// `len` bytes at `at`; what lies beyond the end or in no page is zero.
    pub fn get(&self, at: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.each(at, len, |from, place, n| {
            bytes[from..from + n].copy_from_slice(&self.input[place..place + n])
        });
        bytes
    }

    /// Writes `bytes` at `at`; what lies beyond the end or in no page is left out.
    pub fn put(&mut self, at: u64, bytes: &[u8]) {
        let mut places = Vec::new();
        self.each(at, bytes.len(), |from, place, n| places.push((from, place, n)));
        for (from, place, n) in places {
            self.input[place..place + n].copy_from_slice(&bytes[from..from + n]);
        }
    }

    /// Calls `each` with the pieces of the `len` bytes at `at`: offset among them, place in the input, length.
    fn each(&self, at: u64, len: usize, mut each: impl FnMut(usize, usize, usize)) {
        let end = at.saturating_add(len as u64).min(self.size);
        let mut at_now = at;
        while at_now < end {
            let left = usize::try_from(end - at_now).unwrap();
            let done = usize::try_from(at_now - at).unwrap();
            let Some(pages) = &self.pages else {
                each(done, usize::try_from(at_now).unwrap(), left);
                return;
            };
            let in_page = usize::try_from(at_now % PAGE as u64).unwrap();
            let n = left.min(PAGE - in_page);
            if let Some(place) = pages.get(&(at_now / PAGE as u64)) {
                let there = self.input.len().saturating_sub(place + in_page).min(n);
                // The last page may be cut off.
                if there > 0 {
                    each(done, place + in_page, there);
                }
            }
            at_now += n as u64;
        }
    }

    pub fn le16(&self, at: u64) -> u64 {
        u16::from_le_bytes(self.get(at, 2).try_into().unwrap()).into()
    }

    pub fn le32(&self, at: u64) -> u64 {
        u32::from_le_bytes(self.get(at, 4).try_into().unwrap()).into()
    }

    pub fn le64(&self, at: u64) -> u64 {
        u64::from_le_bytes(self.get(at, 8).try_into().unwrap())
    }

    pub fn has(&self, at: u64, bytes: &[u8]) -> bool {
        self.get(at, bytes.len()) == bytes
    }
}

/// The file written down as `input`, in memory, cut off after `longest` bytes.
pub fn disk(input: &[u8], longest: u64) -> MemoryDisk {
    let mut input = input.to_vec();
    let view = View::new(&mut input);
    let size = view.size().min(longest);
    let disk = MemoryDisk::sparse(size);
    let pieces = view.pieces();
    for (offset, place, len) in pieces {
        for (i, page) in input[place..place + len].chunks(PAGE).enumerate() {
            let at = offset + (i * PAGE) as u64;
            let n = page.len().min(usize::try_from(size.saturating_sub(at)).unwrap_or(PAGE));
            if !is_zero(&page[..n]) {
                disk.write_at(&page[..n], at).unwrap();
            }
        }
    }
    disk
}

/// Writes it into `file`.
pub fn write(input: &[u8], file: &File) {
    let mut input = input.to_vec();
    let view = View::new(&mut input);
    file.set_len(view.size()).unwrap();
    for (offset, place, len) in view.pieces() {
        file.write_all_at(&input[place..place + len], offset).unwrap();
    }
}
