//! LZO1X, unpacked (the stream is described in Linux's Documentation/staging/lzo.rst, version 0 of it).

/// Bytes of a stream that are still to be read.
struct Source<'a>(&'a [u8]);

impl Source<'_> {
    fn byte(&mut self) -> Option<usize> {
        let (first, rest) = self.0.split_first()?;
        self.0 = rest;
        Some(usize::from(*first))
    }

    fn le16(&mut self) -> Option<usize> {
        let (low, high) = (self.byte()?, self.byte()?);
        Some(low | high << 8)
    }

    /// A length in the low `bits` of an instruction; if they are 0, it is above what fits there and follows.
    fn length(&mut self, instruction: usize, bits: u32) -> Option<usize> {
        let most = (1 << bits) - 1;
        if instruction & most != 0 {
            return Some(instruction & most);
        }
        let zeroes = self.0.iter().take_while(|byte| **byte == 0).count();
        self.0 = self.0.get(zeroes..)?;
        Some(most + zeroes * 255 + self.byte()?)
    }
}

/// What was unpacked, up to a limit.
struct Target<'a> {
    out: &'a mut Vec<u8>,
    /// Length of `out` at the start, which no match goes beyond, and at most.
    start: usize,
    end: usize,
}

impl Target<'_> {
    fn literals(&mut self, source: &mut Source<'_>, len: usize) -> Option<()> {
        let (literals, rest) = source.0.split_at_checked(len)?;
        source.0 = rest;
        (len <= self.end - self.out.len()).then(|| self.out.extend_from_slice(literals))
    }

    /// Repeats `len` bytes from `distance` bytes back, which may be fewer than that.
    fn repeat(&mut self, distance: usize, len: usize) -> Option<()> {
        let from = self.out.len().checked_sub(distance).filter(|from| *from >= self.start && distance > 0)?;
        if len > self.end - self.out.len() {
            return None;
        }
        for at in from..from + len {
            self.out.push(*self.out.get(at)?);
        }
        Some(())
    }
}

/// Appends what `source`, one stream, unpacks to, `most` bytes at most; `None` if it is none, or unpacks to more.
pub(super) fn unpack(source: &[u8], most: usize, out: &mut Vec<u8>) -> Option<()> {
    let mut source = Source(source);
    let mut target = Target { start: out.len(), end: out.len() + most, out };
    // Literals copied last: 4 are 4 or more.
    let mut before = 0;
    if let Some(first @ 18..) = source.0.first().copied().map(usize::from) {
        source.byte();
        target.literals(&mut source, first - 17)?;
        before = (first - 17).min(4);
    }
    loop {
        let instruction = source.byte()?;
        let (distance, len, literals) = match instruction {
            0..16 if before == 0 => {
                let len = 3 + source.length(instruction, 4)?;
                target.literals(&mut source, len)?;
                before = 4;
                continue;
            }
            0..16 => {
                let (base, len) = if before == 4 { (2049, 3) } else { (1, 2) };
                (base + (source.byte()? << 2) + (instruction >> 2), len, instruction & 3)
            }
            16..32 => {
                let len = 2 + source.length(instruction, 3)?;
                let operand = source.le16()?;
                let distance = 16_384 + ((instruction & 8) << 11) + (operand >> 2);
                if distance == 16_384 {
                    return Some(());
                }
                (distance, len, operand & 3)
            }
            32..64 => {
                let len = 2 + source.length(instruction, 5)?;
                let operand = source.le16()?;
                (1 + (operand >> 2), len, operand & 3)
            }
            _ => {
                let len =
                    if instruction < 128 { 3 + (instruction >> 5 & 1) } else { 5 + (instruction >> 5 & 3) };
                (1 + (source.byte()? << 3) + (instruction >> 2 & 7), len, instruction & 3)
            }
        };
        target.repeat(distance, len)?;
        target.literals(&mut source, literals)?;
        before = literals;
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn unpacked(source: &[u8], most: usize) -> Option<Vec<u8>> {
        let mut out = b"before".to_vec();
        unpack(source, most, &mut out)?;
        assert!(out.len() <= 6 + most);
        Some(out.split_off(6))
    }

    /// `haul ` twenty times, as lzo1x_1_compress packs it.
    const PACKED: &[u8] = b"\x16haul \x20\x40\x10\x00\x11\x00\x00";

    #[test]
    fn what_lzo_packs_is_unpacked() {
        assert_eq!(unpacked(b"\x11\0\0", 0).unwrap(), b"");
        assert_eq!(unpacked(b"\x15haul\x11\0\0", 4).unwrap(), b"haul");
        assert_eq!(unpacked(PACKED, 102).unwrap(), &b"haul ".repeat(21)[..102]);
        // A literal run whose length is 18 and more.
        let long = [&b"\0\x02"[..], &[b'x'; 20], b"\x11\0\0"].concat();
        assert_eq!(unpacked(&long, 20).unwrap(), [b'x'; 20]);
    }

    #[test]
    fn what_is_cut_off_or_too_long_is_none() {
        for len in 0..PACKED.len() {
            assert_eq!(unpacked(&PACKED[..len], 102), None, "{len}");
        }
        assert_eq!(unpacked(PACKED, 101), None);
        // Repeats bytes before its start.
        assert_eq!(unpacked(b"\x15haul\x40\x01\x11\0\0", 100), None);
    }

    proptest! {
        #[test]
        fn any_bytes_are_unpacked_within_bounds(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let _ = unpacked(&bytes, 4096);
        }
    }
}
