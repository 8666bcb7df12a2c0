//! Which batch's item is released next: tenants take turns by what they were given and their weight, a tenant's batches among themselves.

use std::{
    collections::{HashMap, HashSet},
    time::Instant,
};

use super::{
    active::{Active, Head},
    fair::Fair,
};
use crate::{directory::Directory, tenants::Gate};

/// Items that are released ahead for each place of a hand's live workers: enough that none waits for the dispatcher, few enough that an order in the
/// queue is soon worked off.
const AHEAD: usize = 2;
/// More of them, up to so many, if all are done within this time.
const SHORT: (usize, f64) = (32, 2.0);

/// Whose turn it is.
#[derive(Debug, Default)]
pub(super) struct Turns {
    tenants: Fair<String>,
    /// By tenant.
    batches: HashMap<String, Fair<String>>,
}

impl Turns {
    /// The batch whose item is next, the item's hand, and what it costs: of those that are not `stuck`, whose hand has room, and whose tenant may have another
    /// item running. It counts as given.
    pub(super) fn next(
        &mut self,
        gate: &Gate,
        directory: &Directory,
        active: &HashMap<String, Active>,
        stuck: &HashMap<String, HashSet<String>>,
    ) -> Option<(String, String, f64)> {
        let mut by_hand: HashMap<&str, (usize, f64)> = HashMap::new();
        let mut by_tenant: HashMap<&str, usize> = HashMap::new();
        for one in active.values() {
            *by_tenant.entry(one.tenant()).or_default() += one.open.len();
            for open in one.open.values() {
                let (items, seconds) = by_hand.entry(&open.hand).or_default();
                (*items, *seconds) = (*items + 1, *seconds + open.cost);
            }
        }
        let mut room: HashMap<&str, bool> = HashMap::new();
        let mut waiting: HashMap<&String, HashMap<&String, &Head>> = HashMap::new();
        for (id, one) in active {
            let running = by_tenant.get(one.tenant()).copied().unwrap_or(0);
            if running >= gate.terms(one.tenant()).running {
                continue;
            }
            let may_go = one.heads().filter(|head| {
                let held = by_hand.get(head.hand.as_str()).copied().unwrap_or_default();
                let room =
                    room.entry(&head.hand).or_insert_with(|| has_room(held, directory.hand_capacity(&head.hand)));
                *room && !stuck.get(id).is_some_and(|hands| hands.contains(&head.hand))
            });
            if let Some(first) = may_go.min_by_key(|head| head.index) {
                waiting.entry(&one.batch.tenant).or_default().insert(id, first);
            }
        }
        let now = Instant::now();
        let tenant = self.tenants.next(waiting.keys().copied(), now)?;
        let batches = self.batches.entry(tenant.clone()).or_default();
        let heads = waiting.get(&tenant)?;
        let id = batches.next(heads.keys().copied(), now)?;
        let head = heads.get(&id)?;
        let cost = directory.work(&head.request).map_or(0.0, |(_, cost)| cost);
        let charge = cost.max(f64::MIN_POSITIVE);
        batches.charge(&id, charge, 1.0, now);
        self.tenants.charge(&tenant, charge, gate.terms(&tenant).weight, now);
        Some((id, head.hand.clone(), cost))
    }

    /// Forgets batches that are over, and tenants without any.
    pub(super) fn forget(&mut self, active: &HashMap<String, Active>) {
        let tenants: HashSet<&str> = active.values().map(Active::tenant).collect();
        self.tenants.keep(|tenant| tenants.contains(tenant.as_str()));
        self.batches.retain(|tenant, _| tenants.contains(tenant.as_str()));
        for batches in self.batches.values_mut() {
            batches.keep(|id| active.contains_key(id));
        }
    }
}

/// Whether a hand with so many places may have another item, beside those it has been given: how many, and how many seconds of a hand they take.
fn has_room((items, seconds): (usize, f64), places: usize) -> bool {
    let (most, time) = SHORT;
    items < AHEAD * places || (items < most && seconds < time * places.max(1) as f64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_released_ahead_is_soon_worked_off() {
        // Of 15 s each, two for each of two places; of 10 ms each, as many as are done in 2 s; and no more than 32 of what is not known.
        let most =
            |cost: f64, places| (0..1000).take_while(|items| has_room((*items, *items as f64 * cost), places)).count();
        assert_eq!(most(15.0, 2), 4);
        assert_eq!(most(0.01, 1), 32);
        assert_eq!(most(0.5, 1), 4);
        assert_eq!(most(0.5, 40), 80);
        assert_eq!(most(0.0, 0), 32);
    }
}
