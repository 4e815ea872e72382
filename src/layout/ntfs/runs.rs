//! Where the content of a file lies: the run list of an attribute.

use super::{Step, require};
use crate::unit::Extent;

/// Consecutive clusters of a file that are consecutive on the volume.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Run {
    /// The first one's number in the file (VCN).
    pub vcn: u64,
    /// Their numbers on the volume (LCN).
    pub clusters: Extent,
}

/// Reads the run list in `pairs`, of a file without holes on a volume of `clusters` clusters. A run takes two bytes of it
/// at least.
pub(super) fn decode(pairs: &[u8], clusters: u64) -> Step<Vec<Run>> {
    let mut runs = Vec::new();
    let (mut rest, mut vcn, mut lcn) = (pairs, 0_u64, 0_i64);
    while let Some((head, body)) = rest.split_first()
        && *head != 0
    {
        let (len_size, start_size) = (usize::from(head & 0xf), usize::from(head >> 4));
        require(start_size > 0, || "is sparse".into())?;
        let split = |bytes: &'_ [u8], size: usize| -> Step<i64> {
            let number = bytes.get(..size).filter(|_| (1..=8).contains(&size)).map(signed);
            number.ok_or_else(|| "has a damaged run list".to_owned().into())
        };
        let len = u64::try_from(split(body, len_size)?).unwrap_or(0);
        let body = body.get(len_size..).unwrap_or_default();
        // The start is relative to that of the run before.
        lcn = lcn.wrapping_add(split(body, start_size)?);
        let run = Extent::at(u64::try_from(lcn).unwrap_or(u64::MAX), len);
        require(len > 0 && Extent::new(0, clusters).contains(run), || {
            format!("lies in clusters {run:?} of {clusters}")
        })?;
        runs.push(Run { vcn, clusters: run });
        vcn = vcn.saturating_add(len);
        rest = body.get(start_size..).unwrap_or_default();
    }
    let mut places: Vec<Extent> = runs.iter().map(|run| run.clusters).collect();
    places.sort_unstable();
    let apart = places.iter().zip(places.iter().skip(1)).all(|(one, next)| one.end <= next.start);
    require(apart, || "has runs that overlap".into())?;
    Ok(runs)
}

/// A little-endian number of at most eight bytes with a sign.
fn signed(bytes: &[u8]) -> i64 {
    let fill = if bytes.last().is_some_and(|last| last & 0x80 != 0) { 0xff } else { 0 };
    let mut wide = [fill; 8];
    wide.iter_mut().zip(bytes).for_each(|(to, from)| *to = *from);
    i64::from_le_bytes(wide)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::layout::Stop;

    /// A number in as few bytes as keep its sign.
    fn packed(number: i64) -> Vec<u8> {
        let wide = number.to_le_bytes();
        let len = (1..8).find(|len| signed(&wide[..*len]) == number).unwrap_or(8);
        wide[..len].to_vec()
    }

    fn encode(places: &[Extent]) -> Vec<u8> {
        let (mut pairs, mut last) = (Vec::new(), 0);
        for place in places {
            let start = i64::try_from(place.start).unwrap();
            let (len, delta) = (packed(i64::try_from(place.len()).unwrap()), packed(start - last));
            pairs.push(u8::try_from(len.len() | delta.len() << 4).unwrap());
            pairs.extend(len.into_iter().chain(delta));
            last = start;
        }
        pairs.push(0);
        pairs
    }

    fn why(pairs: &[u8], clusters: u64) -> String {
        match decode(pairs, clusters) {
            Err(Stop::Whole(why)) => why,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn damaged_lists_are_refused() {
        for (pairs, reason) in [
            (&[0x01, 5, 0][..], "sparse"),
            (&[0x10, 5, 0], "damaged"),
            (&[0x19, 5, 0], "damaged"),
            (&[0x11, 5], "damaged"),
            (&[0x91, 5, 1, 1, 1, 1, 1, 1, 1, 1, 1], "damaged"),
            (&[0x11, 0, 5, 0], "clusters"),
            (&[0x11, 0xff, 5, 0], "clusters"),
            (&[0x11, 5, 0xff, 0], "clusters"),
            (&[0x11, 5, 96, 0], "101"),
            (
                &[0x88, 255, 255, 255, 255, 255, 255, 255, 127, 255, 255, 255, 255, 255, 255, 255, 127],
                "clusters",
            ),
            (&[0x11, 5, 10, 0x11, 5, 4, 0], "overlap"),
        ] {
            assert!(why(pairs, 100).contains(reason), "{pairs:x?}: {}", why(pairs, 100));
        }
        assert_eq!(decode(&[0], 100).unwrap(), []);
    }

    proptest! {
        #[test]
        fn a_list_reads_back(starts in prop::collection::btree_set(0..1_u64 << 40, 1..20), seed in 0..20_usize) {
            let mut places: Vec<Extent> = starts.iter().zip(starts.iter().skip(1).chain([&(1 << 40)]))
                .map(|(start, next)| Extent::at(*start, (next - start).div_ceil(2))).collect();
            let middle = seed % places.len();
            places.rotate_left(middle);
            let runs = decode(&encode(&places), 1 << 40).unwrap();
            prop_assert_eq!(runs.iter().map(|run| run.clusters).collect::<Vec<_>>(), places);
            prop_assert!(runs.windows(2).all(|two| two[1].vcn == two[0].vcn + two[0].clusters.len()));
        }

        #[test]
        fn any_bytes_are_a_list_or_refused(pairs in prop::collection::vec(any::<u8>(), 0..64)) {
            if let Ok(runs) = decode(&pairs, 1 << 50) {
                prop_assert!(runs.iter().all(|run| run.clusters.end <= 1 << 50));
            }
        }
    }
}
