//! The records of a pax extended header (POSIX pax, "pax Extended Header"), and those GNU tar adds for sparse files
//! (GNU tar manual, "Storing Sparse Files").

use super::sparse::{MAX_RUNS, Runs};

/// What records can say that matters here.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Known {
    pub name: Option<Vec<u8>>,
    /// Length of the stored data in bytes.
    pub size: Option<u64>,
    pub sparse: Sparse,
}

/// Whether the file is sparse, where its map is, and how long the whole file is.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) enum Sparse {
    #[default]
    No,
    Records(u64),
    Data(u64),
}

/// `(key, value)` of each record; an error says what is wrong with one.
fn records(bytes: &[u8]) -> impl Iterator<Item = Result<(&[u8], &[u8]), String>> {
    let mut rest = bytes;
    std::iter::from_fn(move || {
        if rest.is_empty() {
            return None;
        }
        let record = record(rest).map(|(key, value, after)| {
            rest = after;
            (key, value)
        });
        if record.is_none() {
            rest = &[];
        }
        Some(record.ok_or_else(|| "a pax record that is not LENGTH KEY=VALUE".to_owned()))
    })
}

fn record(bytes: &[u8]) -> Option<(&[u8], &[u8], &[u8])> {
    let space = bytes.iter().take(20).position(|byte| *byte == b' ')?;
    let len = usize::try_from(decimal(&bytes[..space])?).ok()?;
    let (record, rest) = bytes.split_at_checked(len)?;
    let body = record.get(space + 1..)?.strip_suffix(b"\n")?;
    let equals = body.iter().position(|byte| *byte == b'=')?;
    let (key, value) = body.split_at(equals);
    Some((key, value.get(1..)?, rest))
}

/// A decimal number without sign or spaces.
pub(super) fn decimal(digits: &[u8]) -> Option<u64> {
    if digits.is_empty() || !digits.iter().all(u8::is_ascii_digit) {
        return None;
    }
    std::str::from_utf8(digits).ok()?.parse().ok()
}

/// What the records in `bytes` say; an error says why they are refused.
pub(super) fn read(bytes: &[u8]) -> Result<Known, String> {
    let mut known = Known::default();
    let (mut real_name, mut real_size, mut old_size) = (None, None, None);
    let (mut major, mut minor) = (None, None);
    for record in records(bytes) {
        let (key, value) = record?;
        let number = || {
            decimal(value)
                .ok_or_else(|| format!("the pax record {} is no number", String::from_utf8_lossy(key)))
        };
        match key {
            b"path" => known.name = Some(value.to_vec()),
            b"size" => known.size = Some(number()?),
            b"GNU.sparse.name" => real_name = Some(value.to_vec()),
            b"GNU.sparse.realsize" => real_size = Some(number()?),
            b"GNU.sparse.size" => old_size = Some(number()?),
            b"GNU.sparse.major" => major = Some(number()?),
            b"GNU.sparse.minor" => minor = Some(number()?),
            b"GNU.sparse.map" | b"GNU.sparse.numblocks" | b"GNU.sparse.offset" | b"GNU.sparse.numbytes" => {}
            // Other ways of storing sparse files, by star and Solaris.
            b"SCHILY.realsize" | b"SUN.holesdata" => {
                let key = String::from_utf8_lossy(key);
                return Err(format!("a sparse file of an unknown kind (pax record {key})"));
            }
            key if key.starts_with(b"GNU.sparse.") => {
                let key = String::from_utf8_lossy(key);
                return Err(format!("a sparse file of an unknown kind (pax record {key:?})"));
            }
            _ => {}
        }
    }
    known.name = real_name.or(known.name);
    known.sparse = match (major, minor, real_size, old_size) {
        (None, None, None, None) => Sparse::No,
        (None, None, None, Some(size)) => Sparse::Records(size),
        (Some(1), Some(0), Some(size), None) => Sparse::Data(size),
        _ => return Err("a sparse file of an unknown version".to_owned()),
    };
    Ok(known)
}

/// The map in the records of versions 0.0, a record for each number, and 0.1, one record for all.
pub(super) fn runs(bytes: &[u8]) -> Runs {
    let mut numbers = Vec::new();
    let mut list = None;
    for record in records(bytes) {
        match record? {
            (b"GNU.sparse.map", value) => list = Some(value),
            (b"GNU.sparse.offset", value) if numbers.len() % 2 == 0 => numbers.push(value),
            (b"GNU.sparse.numbytes", value) if numbers.len() % 2 == 1 => numbers.push(value),
            (b"GNU.sparse.offset" | b"GNU.sparse.numbytes", _) => {
                return Err("offsets and lengths do not take turns".to_owned());
            }
            _ => {}
        }
        if numbers.len() / 2 > MAX_RUNS {
            return Err(format!("it has more than {MAX_RUNS} runs"));
        }
    }
    if let Some(list) = list {
        if !numbers.is_empty() {
            return Err("there are two maps".to_owned());
        }
        numbers = list.split(|byte| *byte == b',').filter(|number| !number.is_empty()).collect();
    }
    let (pairs, odd) = numbers.as_chunks::<2>();
    if !odd.is_empty() {
        return Err("an offset without a length".to_owned());
    }
    let pair = |[offset, len]: &[&[u8]; 2]| Some((decimal(offset)?, decimal(len)?));
    pairs.iter().map(|both| pair(both).ok_or_else(|| "an entry is no number".to_owned())).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn records_are_taken_by_their_length_and_not_by_their_lines() {
        let known = read(b"18 comment=a\nb\n=c\n12 path=x/y\n14 size=70000\n").unwrap();
        assert_eq!((known.name.as_deref(), known.size), (Some(&b"x/y"[..]), Some(70_000)));
        for bad in [
            &b"12 path=x/y"[..],
            b"13 path=x/y\n",
            b"99 path=x/y\n",
            b"0 \n",
            b"3 \n",
            b"6 abc\n",
            b"-12 path=x\n",
            b"99999999999999999999999 path=x\n",
            b"12 size=0x1\n",
            b"11 size=-1\n",
        ] {
            assert!(read(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn a_sparse_file_of_another_version_is_refused() {
        assert!(read(b"22 GNU.sparse.major=2\n22 GNU.sparse.minor=0\n").is_err());
        assert!(read(b"22 GNU.sparse.major=1\n").is_err());
        assert!(read(b"26 GNU.sparse.dumbytes=12\n").is_err());
        assert!(read(b"23 SCHILY.realsize=100\n").is_err());
    }
}
