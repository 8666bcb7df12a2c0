//! Which batch's item is released next: tenants take turns by what they were given and their weight, a tenant's batches among themselves.

use std::{
    collections::{HashMap, HashSet},
    time::Instant,
};

use super::{active::Active, fair::Fair};
use crate::{directory::Directory, tenants::Gate};

/// Fewest items that are released ahead for a hand, and how many for each place of its live workers: enough that none waits for the
/// dispatcher, few enough that an order in the queue is soon worked off.
const AHEAD: (usize, usize) = (32, 2);

/// Whose turn it is.
#[derive(Debug, Default)]
pub(super) struct Turns {
    tenants: Fair<String>,
    /// By tenant.
    batches: HashMap<String, Fair<String>>,
}

impl Turns {
    /// The batch whose item is next, of those that are not `stuck`, whose hand has room, and whose tenant may have another item running. It counts as given.
    pub(super) fn next(
        &mut self,
        gate: &Gate,
        directory: &Directory,
        active: &HashMap<String, Active>,
        stuck: &HashSet<String>,
    ) -> Option<String> {
        let mut by_hand: HashMap<&str, usize> = HashMap::new();
        let mut by_tenant: HashMap<&str, usize> = HashMap::new();
        for one in active.values() {
            *by_tenant.entry(one.tenant()).or_default() += one.open.len();
            for open in one.open.values() {
                *by_hand.entry(&open.hand).or_default() += 1;
            }
        }
        let mut room: HashMap<&str, bool> = HashMap::new();
        let mut waiting: HashMap<&String, Vec<&String>> = HashMap::new();
        for (id, one) in active.iter().filter(|(id, _)| !stuck.contains(*id)) {
            let Some(head) = one.head() else { continue };
            let held = by_hand.get(head.hand.as_str()).copied().unwrap_or(0);
            let has_room = *room
                .entry(&head.hand)
                .or_insert_with(|| held < AHEAD.0.max(AHEAD.1 * directory.hand_capacity(&head.hand)));
            let running = by_tenant.get(one.tenant()).copied().unwrap_or(0);
            if has_room && running < gate.terms(one.tenant()).running {
                waiting.entry(&one.batch.tenant).or_default().push(id);
            }
        }
        let now = Instant::now();
        let tenant = self.tenants.next(waiting.keys().copied(), now)?;
        let batches = self.batches.entry(tenant.clone()).or_default();
        let id = batches.next(waiting.get(&tenant)?.iter().copied(), now)?;
        let cost = active.get(&id)?.head()?.cost.max(f64::MIN_POSITIVE);
        batches.charge(&id, cost, 1.0, now);
        self.tenants.charge(&tenant, cost, gate.terms(&tenant).weight, now);
        Some(id)
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
