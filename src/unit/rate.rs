//! Bytes per second, and the token bucket that holds traffic to it. The clock is passed in.

use std::time::Duration;

use crate::error::Result;

/// A rate in bytes per second; never zero.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rate(u64);

impl Rate {
    /// `bytes` per second; `None` for zero, which means "no limit" on the command line.
    pub const fn per_second(bytes: u64) -> Option<Self> {
        if bytes == 0 { None } else { Some(Rate(bytes)) }
    }

    /// Reads `10M` as 10 MiB per second; `0` is no limit.
    pub fn parse(text: &str) -> Result<Option<Self>> {
        super::bytes::parse(text).map(Rate::per_second)
    }

    /// Bytes per second.
    pub const fn get(self) -> u64 {
        self.0
    }
}

/// A token bucket that holds one fortieth of a second of traffic: no one-second window passes more than 102.5 % of
/// the rate by the clock, which leaves as much again for senders that wake late.
#[derive(Debug)]
pub struct TokenBucket {
    rate: Rate,
    /// When the bucket will next be full.
    full_at: Duration,
}

impl TokenBucket {
    const BURST: Duration = Duration::from_millis(25);

    /// A full bucket; `now` is any monotonic clock's reading.
    pub fn new(rate: Rate, now: Duration) -> Self {
        TokenBucket { rate, full_at: now }
    }

    /// The largest request [`TokenBucket::take`] may be asked for at once without going over the rate.
    pub fn burst(&self) -> u64 {
        (self.rate.0 / 40).max(1)
    }

    /// Takes `bytes` and says how long to wait before sending them.
    pub fn take(&mut self, bytes: u64, now: Duration) -> Duration {
        let nanos = u128::from(bytes) * 1_000_000_000 / u128::from(self.rate.0);
        let cost = Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX));
        self.full_at = self.full_at.max(now).saturating_add(cost);
        self.full_at.saturating_sub(now).saturating_sub(Self::BURST)
    }

    /// Changes the rate from now on; what was taken stays taken.
    pub fn set_rate(&mut self, rate: Rate) {
        self.rate = rate;
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn no_one_second_window_passes_more_than_105_percent(
            rate in 1_000u64..100_000_000,
            pieces in prop::collection::vec((1u64..=20, 0u64..100), 1..200),
        ) {
            let mut bucket = TokenBucket::new(Rate(rate), Duration::ZERO);
            let mut now = Duration::ZERO;
            let mut sent: Vec<(Duration, u64)> = Vec::new();
            for (share, pause) in pieces {
                now += Duration::from_millis(pause);
                let bytes = (bucket.burst() / share).max(1);
                now += bucket.take(bytes, now);
                sent.push((now, bytes));
            }
            for (i, (start, _)) in sent.iter().enumerate() {
                let window: u64 = sent[i..].iter()
                    .take_while(|(at, _)| *at - *start < Duration::from_secs(1))
                    .map(|(_, bytes)| bytes).sum();
                prop_assert!(window <= rate + rate / 20 + 2, "{window} bytes at a rate of {rate}");
            }
        }
    }

    #[test]
    fn zero_is_no_limit() {
        assert_eq!(Rate::parse("0").unwrap(), None);
        assert_eq!(Rate::parse("1M").unwrap(), Rate::per_second(1 << 20));
    }
}
