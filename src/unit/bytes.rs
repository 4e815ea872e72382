//! Sizes in bytes as people write and read them.

use super::{GIB, KIB, MIB, TIB};
use crate::error::{Error, Kind, Result};

const UNITS: [(&str, u64); 4] = [("TiB", TIB), ("GiB", GIB), ("MiB", MIB), ("KiB", KIB)];

/// `n` bytes for a reader: two decimals of the largest binary unit not above it.
pub fn human(n: u64) -> String {
    for (name, unit) in UNITS {
        if n >= unit {
            let hundredths = (u128::from(n) * 100 + u128::from(unit) / 2) / u128::from(unit);
            return format!("{}.{:02} {name}", hundredths / 100, hundredths % 100);
        }
    }
    format!("{n} B")
}

/// Reads `64`, `64K`, `64KiB`, `1.5G`, `16TiB` as bytes. Units are binary, as in qemu-img and rsync.
pub fn parse(text: &str) -> Result<u64> {
    let bad = || {
        Error::new(Kind::Usage, "usage.size", format!("{text:?} is not a size"))
            .remedy("write a number with an optional unit K, M, G or T, such as 16M")
    };
    let text = text.trim();
    let split = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, unit) = text.split_at(split);
    let unit = match unit.trim().trim_end_matches("iB").trim_end_matches('B').to_ascii_uppercase().as_str() {
        "" => 1,
        "K" => KIB,
        "M" => MIB,
        "G" => GIB,
        "T" => TIB,
        _ => return Err(bad()),
    };
    let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
    if fraction.len() > 9 {
        return Err(bad());
    }
    let whole: u128 = whole.parse().map_err(|_| bad())?;
    let scale = 10u128.pow(u32::try_from(fraction.len()).map_err(|_| bad())?);
    let fraction: u128 = if fraction.is_empty() { 0 } else { fraction.parse().map_err(|_| bad())? };
    let total = whole.checked_mul(u128::from(unit)).ok_or_else(bad)? + fraction * u128::from(unit) / scale;
    u64::try_from(total).map_err(|_| bad())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_read_back() {
        for (text, n) in [
            ("0", 0),
            ("512", 512),
            ("64K", 65_536),
            ("64KiB", 65_536),
            ("1.5G", 3 * GIB / 2),
            ("16TiB", 16 * TIB),
            ("3B", 3),
        ] {
            assert_eq!(parse(text).unwrap(), n, "{text}");
        }
        for text in ["", "x", "1X", "-1", "1.2.3", "99999999999999999999T"] {
            assert!(parse(text).is_err(), "{text}");
        }
    }

    #[test]
    fn sizes_are_short_for_a_reader() {
        assert_eq!(human(0), "0 B");
        assert_eq!(human(1023), "1023 B");
        assert_eq!(human(1536), "1.50 KiB");
        assert_eq!(human(8 * GIB), "8.00 GiB");
        assert_eq!(human(u64::MAX), "16777216.00 TiB");
    }
}
