//! Thousands of damaged images: each an error or a disk, in bounded time and memory.

use super::bounds::Bounds;
use super::images::{Random, seed};

/// An image, and where in it damage matters: starts and lengths.
pub struct Sample {
    pub image: Vec<u8>,
    pub areas: Vec<(usize, usize)>,
    /// Makes its checksums right again.
    pub seal: fn(&mut [u8]),
}

/// Cuts `image` off, or writes over some of `areas`, mostly with values of consequence.
fn damage(sample: &Sample, random: &mut Random) -> Vec<u8> {
    let below = |random: &mut Random, n: usize| usize::try_from(random.below(n as u64)).unwrap();
    let mut image = sample.image.clone();
    let len = image.len();
    if random.below(8) == 0 {
        let (start, area) = sample.areas[below(random, sample.areas.len())];
        let cut = match random.below(3) {
            0 => below(random, len),
            1 => start + below(random, area),
            _ => len - below(random, 3000).min(len),
        };
        image.truncate(cut);
        return image;
    }
    for _ in 0..=random.below(3) {
        let (start, area) = sample.areas[below(random, sample.areas.len())];
        let at = start + below(random, area);
        let interesting = [
            0,
            1,
            6,
            u64::MAX,
            1 << 63,
            1 << 31,
            len as u64,
            len as u64 / 512,
            len as u64 - 512,
            1 << 20 | 6,
            u64::from(u32::MAX) << 20 | 6,
            random.next(),
            random.next() >> 32,
            random.next() >> 48,
        ];
        let value = interesting[below(random, interesting.len())];
        let value = if random.below(2) == 0 { value.to_le_bytes() } else { value.to_be_bytes() };
        let (at, bytes) = match random.below(4) {
            0 => (at, &value[7..]),
            1 => (at, &value[..1]),
            2 => (at / 4 * 4, if value[0] == 0 { &value[4..] } else { &value[..4] }),
            _ => (at / 8 * 8, &value[..]),
        };
        for (to, from) in image.iter_mut().skip(at).zip(bytes) {
            *to = *from;
        }
    }
    // Damage that a checksum reveals is seen at once: most is looked at with its sum right.
    if random.below(4) > 0 {
        (sample.seal)(&mut image);
    }
    image
}

/// Gives `count` damaged images made of `samples`, which are `what`, to `fuzz`, which says whether it opened one. None
/// may panic, take longer than two seconds of the processor, or hold more than `limit` bytes at once beyond its own.
pub fn run_through(what: &str, samples: &[Sample], count: usize, limit: usize, fuzz: fn(&[u8]) -> bool) {
    let seed = seed();
    let mut random = Random(seed);
    for (i, sample) in samples.iter().enumerate() {
        assert!(fuzz(&sample.image), "sample {i} is undamaged");
    }
    let (mut opened, mut bounds) = (0, Bounds::default());
    for i in 0..count {
        let sample = &samples[i % samples.len()];
        let image = damage(sample, &mut random);
        let name = format!("damage {i} of HAUL_SEED={seed}, sample {}", i % samples.len());
        opened += usize::from(bounds.hold(&name, image.len(), limit, || fuzz(&image)));
    }
    bounds.print(&format!("damaged {what} images, of which {opened} opened"));
    assert!(
        opened > count / 10 && opened < count * 9 / 10,
        "{opened} of {count}: the damage misses its mark"
    );
}
