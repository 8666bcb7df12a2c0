//! Whose turn it is: weighted fair queueing, with ageing. Pure, so that it can be proved.
//!
//! Each key (a tenant; within a tenant, a batch) has an account of what it was given, divided by its weight. Of those that wait, the one
//! with the smallest account is next, and is charged what its item costs. A key that had nothing to do, or could not be served, does not save
//! up: it begins where the others are. One whose account is far ahead, because its weight is small or its items are costly, comes nearer
//! the longer it has waited, so that nobody waits for ever.

use std::{
    collections::HashMap,
    hash::Hash,
    time::{Duration, Instant},
};

/// After this time of waiting, a key's account counts as half as far ahead as it is, after twice the time as a quarter, and so on.
pub(super) const AGEING: Duration = Duration::from_secs(600);

/// The accounts.
#[derive(Debug)]
pub(super) struct Fair<K> {
    accounts: HashMap<K, Account>,
    /// Where the key was that was served last: nobody begins behind it.
    clock: f64,
}

#[derive(Debug, Clone, Copy)]
struct Account {
    given: f64,
    waiting_since: Instant,
}

impl<K> Default for Fair<K> {
    fn default() -> Self {
        Self { accounts: HashMap::new(), clock: 0.0 }
    }
}

impl<K: Eq + Hash + Clone + Ord> Fair<K> {
    /// Of the keys that wait, whose turn it is. Keys that do not wait lose what they have not used.
    pub(super) fn next<'a>(&mut self, waiting: impl Iterator<Item = &'a K>, now: Instant) -> Option<K>
    where
        K: 'a,
    {
        let clock = self.clock;
        let mut first: Option<(f64, &K)> = None;
        for key in waiting {
            let account =
                self.accounts.entry(key.clone()).or_insert_with(|| Account { given: clock, waiting_since: now });
            account.given = account.given.max(clock);
            let waited = now.saturating_duration_since(account.waiting_since).as_secs_f64();
            let ahead = (account.given - clock) * (-waited / AGEING.as_secs_f64()).exp2();
            // Equal ones in the order of their names, so that it does not depend on chance.
            if first.is_none_or(|(least, other)| ahead < least || (ahead <= least && key < other)) {
                first = Some((ahead, key));
            }
        }
        let (ahead, key) = first?;
        self.clock += ahead;
        Some(key.clone())
    }

    /// Takes down what the key whose turn it was has been given.
    pub(super) fn charge(&mut self, key: &K, cost: f64, weight: f64, now: Instant) {
        let clock = self.clock;
        let account = self.accounts.entry(key.clone()).or_insert(Account { given: clock, waiting_since: now });
        // From where it was served, which ageing may have brought nearer.
        account.given = clock + cost / weight;
        account.waiting_since = now;
    }

    /// Forgets keys that have nothing to do any more.
    pub(super) fn keep(&mut self, wanted: impl Fn(&K) -> bool) {
        self.accounts.retain(|key, _| wanted(key));
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Gives `turns` items away, each of which takes `seconds`, to keys that always wait: (weight, cost of an item). What each was given.
    fn share(keys: &[(f64, f64)], turns: usize, seconds: f64) -> Vec<f64> {
        let names: Vec<usize> = (0..keys.len()).collect();
        let (mut fair, mut now, mut given) = (Fair::default(), Instant::now(), vec![0.0; keys.len()]);
        for _ in 0..turns {
            let key = fair.next(names.iter(), now).expect("all wait");
            let (weight, cost) = keys[key];
            fair.charge(&key, cost, weight, now);
            given[key] += cost;
            now += Duration::from_secs_f64(seconds);
        }
        given
    }

    proptest! {
        /// Shares are as the weights, up to one item of each: the bound of start-time fair queueing.
        #[test]
        fn shares_are_as_weights(keys in prop::collection::vec((0.1..10.0f64, 0.1..50.0f64), 2..8)) {
            // So quick that ageing does not count.
            let given = share(&keys, 4000, 1e-6);
            for (a, (weight_a, cost_a)) in keys.iter().enumerate() {
                for (b, (weight_b, cost_b)) in keys.iter().enumerate() {
                    let apart = (given[a] / weight_a - given[b] / weight_b).abs();
                    prop_assert!(apart <= (cost_a / weight_a + cost_b / weight_b) * 1.01, "{given:?}");
                }
            }
        }

        /// However small a weight and however costly its items, whoever waits is served again and again.
        #[test]
        fn nobody_starves(weight in 1e-4..1.0f64, cost in 1.0..1000.0f64, others in 1..6usize) {
            let mut keys = vec![(weight, cost)];
            keys.resize(others + 1, (10.0, 0.1));
            let given = share(&keys, 4000, 60.0);
            prop_assert!(given[0] >= 3.0 * cost, "{given:?}");
        }

        /// One that comes late begins at once and gets its share from then on, nothing for the time before.
        #[test]
        fn nobody_saves_up(early in 10..2000usize, weight in 0.2..5.0f64) {
            let (mut fair, now) = (Fair::default(), Instant::now());
            for _ in 0..early {
                let key = fair.next([0].iter(), now).expect("it waits");
                fair.charge(&key, 1.0, 1.0, now);
            }
            let mut given = [0.0; 2];
            for _ in 0..1000 {
                let key = fair.next([0, 1].iter(), now).expect("both wait");
                fair.charge(&key, 1.0, [1.0, weight][key], now);
                given[key] += 1.0;
            }
            let fair_share = 1000.0 * weight / (1.0 + weight);
            prop_assert!((given[1] - fair_share).abs() <= 2.0 + 1.0 / weight.min(1.0), "{given:?}");
        }
    }
}
