//! Byte ranges and sets of byte ranges, listed ([`ExtentMap`]) or asked lazily ([`Extents`]).

use std::fmt;

use crate::error::Result;

/// A non-empty-or-empty half-open byte range `start..end` with `start <= end`.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Extent {
    /// First byte.
    pub start: u64,
    /// One past the last byte.
    pub end: u64,
}

impl Extent {
    /// The range `start..end`; empty when `end < start`.
    pub const fn new(start: u64, end: u64) -> Self {
        Extent { start, end: if end < start { start } else { end } }
    }

    /// `len` bytes at `offset`, cut off at the largest offset there is.
    pub const fn at(offset: u64, len: u64) -> Self {
        Extent { start: offset, end: offset.saturating_add(len) }
    }

    /// Length in bytes.
    pub const fn len(&self) -> u64 {
        self.end - self.start
    }

    /// Whether there is no byte in it.
    pub const fn is_empty(&self) -> bool {
        self.start == self.end
    }

    /// The bytes in both.
    pub fn intersect(&self, other: Extent) -> Extent {
        Extent::new(self.start.max(other.start), self.end.min(other.end))
    }

    /// Whether every byte of `other` is in this one.
    pub fn contains(&self, other: Extent) -> bool {
        self.start <= other.start && other.end <= self.end
    }

    /// The smallest range of whole `align`-byte units around this one (`align` > 0).
    pub fn widened(&self, align: u64) -> Extent {
        Extent::new(self.start / align * align, self.end.div_ceil(align).saturating_mul(align))
    }

    /// The same range `by` bytes further on.
    pub fn shifted(&self, by: u64) -> Extent {
        Extent { start: self.start.saturating_add(by), end: self.end.saturating_add(by) }
    }
}

impl fmt::Debug for Extent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}..{}", self.start, self.end)
    }
}

/// A set of byte ranges asked one at a time, so that a 16 TiB disk never needs a list in memory.
pub trait Extents: Send + Sync {
    /// The first non-empty run of the set with a byte at or after `from`, cut to begin at or after `from`.
    /// Two answers may touch: the next run may begin where this one ends.
    fn next_extent(&self, from: u64) -> Result<Option<Extent>>;
}

impl<T: Extents + ?Sized> Extents for std::sync::Arc<T> {
    fn next_extent(&self, from: u64) -> Result<Option<Extent>> {
        (**self).next_extent(from)
    }
}

impl<T: Extents + ?Sized> Extents for &T {
    fn next_extent(&self, from: u64) -> Result<Option<Extent>> {
        (**self).next_extent(from)
    }
}

/// A single run is a set.
impl Extents for Extent {
    fn next_extent(&self, from: u64) -> Result<Option<Extent>> {
        Ok(Some(Extent::new(self.start.max(from), self.end)).filter(|run| run.start < run.end))
    }
}

/// The bytes in both sets.
pub struct Intersection<A, B>(pub A, pub B);

impl<A: Extents, B: Extents> Extents for Intersection<A, B> {
    fn next_extent(&self, from: u64) -> Result<Option<Extent>> {
        let mut from = from;
        loop {
            let Some(a) = self.0.next_extent(from)? else { return Ok(None) };
            let Some(b) = self.1.next_extent(a.start)? else { return Ok(None) };
            let both = a.intersect(b);
            if !both.is_empty() {
                return Ok(Some(both));
            }
            from = b.start;
        }
    }
}

/// The bytes in either set.
pub struct Union<A, B>(pub A, pub B);

impl<A: Extents, B: Extents> Extents for Union<A, B> {
    fn next_extent(&self, from: u64) -> Result<Option<Extent>> {
        Ok(match (self.0.next_extent(from)?, self.1.next_extent(from)?) {
            (None, only) | (only, None) => only,
            (Some(a), Some(b)) => {
                let (first, second) = if a.start <= b.start { (a, b) } else { (b, a) };
                let end = if second.start <= first.end { first.end.max(second.end) } else { first.end };
                Some(Extent::new(first.start, end))
            }
        })
    }
}

/// The bytes of the first set that are not in the second.
pub struct Difference<A, B>(pub A, pub B);

impl<A: Extents, B: Extents> Extents for Difference<A, B> {
    fn next_extent(&self, from: u64) -> Result<Option<Extent>> {
        let mut from = from;
        loop {
            let Some(a) = self.0.next_extent(from)? else { return Ok(None) };
            match self.1.next_extent(a.start)? {
                Some(b) if b.start == a.start => from = b.end,
                Some(b) => return Ok(Some(Extent::new(a.start, a.end.min(b.start)))),
                None => return Ok(Some(a)),
            }
        }
    }
}

/// A listed set: sorted, non-empty runs that neither overlap nor touch.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct ExtentMap {
    runs: Vec<Extent>,
}

impl ExtentMap {
    /// The empty set.
    pub const fn new() -> Self {
        ExtentMap { runs: Vec::new() }
    }

    /// Adds every byte of `extent`. Constant time when extents come in order.
    pub fn insert(&mut self, extent: Extent) {
        if extent.is_empty() {
            return;
        }
        let first = self.runs.partition_point(|run| run.end < extent.start);
        let last = first + self.runs[first..].partition_point(|run| run.start <= extent.end);
        if first == last {
            self.runs.insert(first, extent);
            return;
        }
        let merged =
            Extent::new(extent.start.min(self.runs[first].start), extent.end.max(self.runs[last - 1].end));
        self.runs.splice(first..last, [merged]);
    }

    /// Takes every byte of `extent` out.
    pub fn remove(&mut self, extent: Extent) {
        if extent.is_empty() {
            return;
        }
        let first = self.runs.partition_point(|run| run.end <= extent.start);
        let last = first + self.runs[first..].partition_point(|run| run.start < extent.end);
        if first == last {
            return;
        }
        let left = Extent::new(self.runs[first].start, extent.start);
        let right = Extent::new(extent.end, self.runs[last - 1].end);
        self.runs.splice(first..last, [left, right].into_iter().filter(|run| !run.is_empty()));
    }

    /// The runs, in order.
    pub fn iter(&self) -> impl DoubleEndedIterator<Item = Extent> + ExactSizeIterator + '_ {
        self.runs.iter().copied()
    }

    /// The parts of the runs inside `within`, in order.
    pub fn within(&self, within: Extent) -> impl Iterator<Item = Extent> + '_ {
        let first = self.runs.partition_point(|run| run.end <= within.start);
        self.runs[first..].iter().map(move |run| run.intersect(within)).take_while(|run| !run.is_empty())
    }

    /// The run that holds `offset`.
    pub fn run_at(&self, offset: u64) -> Option<Extent> {
        let i = self.runs.partition_point(|run| run.end <= offset);
        self.runs.get(i).copied().filter(|run| run.start <= offset)
    }

    /// Whether every byte of `extent` is in the set.
    pub fn covers(&self, extent: Extent) -> bool {
        extent.is_empty() || self.run_at(extent.start).is_some_and(|run| run.contains(extent))
    }

    /// The number of bytes in the set.
    pub fn bytes(&self) -> u64 {
        self.runs.iter().map(Extent::len).sum()
    }

    /// The number of runs.
    pub fn len(&self) -> usize {
        self.runs.len()
    }

    /// Whether the set has no byte.
    pub fn is_empty(&self) -> bool {
        self.runs.is_empty()
    }
}

impl Extents for ExtentMap {
    fn next_extent(&self, from: u64) -> Result<Option<Extent>> {
        let i = self.runs.partition_point(|run| run.end <= from);
        Ok(self.runs.get(i).map(|run| Extent::new(run.start.max(from), run.end)))
    }
}

impl FromIterator<Extent> for ExtentMap {
    fn from_iter<I: IntoIterator<Item = Extent>>(extents: I) -> Self {
        let mut map = ExtentMap::new();
        extents.into_iter().for_each(|extent| map.insert(extent));
        map
    }
}

impl Extend<Extent> for ExtentMap {
    fn extend<I: IntoIterator<Item = Extent>>(&mut self, extents: I) {
        extents.into_iter().for_each(|extent| self.insert(extent));
    }
}

impl fmt::Debug for ExtentMap {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(&self.runs).finish()
    }
}

/// Every run of a lazy set inside `within`, merged, as a list. For sets known to be small, and for tests.
pub fn collect(set: &dyn Extents, within: Extent) -> Result<ExtentMap> {
    let mut map = ExtentMap::new();
    let mut from = within.start;
    while let Some(run) = set.next_extent(from)? {
        let run = run.intersect(within);
        if run.is_empty() {
            break;
        }
        map.insert(run);
        from = run.end;
    }
    Ok(map)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const SPAN: u64 = 64;
    const ALL: Extent = Extent::new(0, SPAN);

    fn bits(map: &ExtentMap) -> u64 {
        map.iter().flat_map(|run| run.start..run.end).fold(0, |bits, i| bits | 1 << i)
    }

    fn sets() -> impl Strategy<Value = (ExtentMap, u64)> {
        prop::collection::vec((0..SPAN, 0..16u64, any::<bool>()), 0..12).prop_map(|steps| {
            let (mut map, mut model) = (ExtentMap::new(), 0u64);
            for (start, len, add) in steps {
                let extent = Extent::new(start, (start + len).min(SPAN));
                let mask = (extent.start..extent.end).fold(0u64, |m, i| m | 1 << i);
                if add {
                    map.insert(extent);
                    model |= mask;
                } else {
                    map.remove(extent);
                    model &= !mask;
                }
            }
            (map, model)
        })
    }

    proptest! {
        #[test]
        fn insert_and_remove_are_set_operations((map, model) in sets()) {
            prop_assert_eq!(bits(&map), model);
            prop_assert_eq!(map.bytes(), u64::from(model.count_ones()));
            for pair in map.runs.windows(2) {
                prop_assert!(pair[0].end < pair[1].start, "runs touch or overlap: {:?}", map);
            }
        }

        #[test]
        fn lazy_sets_agree_with_listed_ones((a, am) in sets(), (b, bm) in sets()) {
            for (set, model) in [
                (Box::new(Intersection(&a, &b)) as Box<dyn Extents>, am & bm),
                (Box::new(Union(&a, &b)), am | bm),
                (Box::new(Difference(&a, &b)), am & !bm),
            ] {
                prop_assert_eq!(bits(&collect(&*set, ALL).unwrap()), model);
            }
        }

        #[test]
        fn questions_about_a_range_agree_with_the_bits((map, model) in sets(), start in 0..SPAN, len in 0..SPAN) {
            let asked = Extent::new(start, (start + len).min(SPAN));
            let mask = (asked.start..asked.end).fold(0u64, |m, i| m | 1 << i);
            prop_assert_eq!(map.covers(asked), model & mask == mask);
            prop_assert_eq!(bits(&map.within(asked).collect()), model & mask);
        }
    }
}
