//! Faults by plan: what is killed or paused, when, and for how long, all from one number, so that a run can be had again.

use std::{
    collections::BTreeMap,
    fmt,
    sync::{Arc, Mutex},
    time::Duration,
};

use efferent_bus::{Bucket, SharedBus, contract::free_port};
use tokio::{sync::Mutex as Slot, task::JoinSet, time::Instant};

use crate::processes::{Cluster, Process};

/// A small generator of numbers (splitmix64).
#[derive(Debug, Clone)]
pub struct Dice(u64);

impl Dice {
    /// That begins with this number.
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// The next number, below `limit`.
    pub fn below(&mut self, limit: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (mixed ^ (mixed >> 31)) % limit.max(1)
    }

    /// A time between two others.
    pub fn between(&mut self, least: Duration, most: Duration) -> Duration {
        least + Duration::from_millis(self.below((most - least).as_millis() as u64))
    }
}

/// The number that faults follow from: EFFERENT_FAULT_SEED, or one of the clock. It is printed.
pub fn seed() -> u64 {
    let given = std::env::var("EFFERENT_FAULT_SEED").ok();
    let seed = given.map_or_else(
        || std::time::UNIX_EPOCH.elapsed().expect("the clock is right").as_millis() as u64,
        |text| text.parse().expect("EFFERENT_FAULT_SEED is a number"),
    );
    eprintln!("faults by seed: EFFERENT_FAULT_SEED={seed}");
    seed
}

/// What a fault happens to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Target {
    /// A brain.
    Brain(usize),
    /// A hand.
    Hand(usize),
    /// A coordinator.
    Coordinator(usize),
    /// Whichever coordinator dispatches batches at the time.
    Dispatcher,
    /// A nats-server.
    Server(usize),
}

/// What happens.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Action {
    /// `kill -9`; another is started after the fault's time.
    Kill,
    /// SIGSTOP, and SIGCONT after the fault's time.
    Pause,
}

/// One of a plan.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Fault {
    /// After the beginning.
    pub at: Duration,
    /// Whom.
    pub target: Target,
    /// What.
    pub action: Action,
    /// How long.
    pub lasts: Duration,
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{:6.2} s  {:?} {:?} for {:.2} s",
            self.at.as_secs_f64(),
            self.action,
            self.target,
            self.lasts.as_secs_f64()
        )
    }
}

/// What a plan may hit, and how hard.
#[derive(Debug, Clone)]
pub struct Scope {
    /// Processes of each kind.
    pub brains: usize,
    /// As above.
    pub hands: usize,
    /// As above.
    pub coordinators: usize,
    /// As above.
    pub servers: usize,
    /// Shortest and longest time from one fault to the next.
    pub apart: (Duration, Duration),
    /// Whether servers are hit. (A cluster of three bears the loss of one, not of two at once.)
    pub hits_servers: bool,
    /// Pauses last between these: longer than a lease, so that work is given to others and then goes on all the same.
    pub pauses: (Duration, Duration),
    /// When it ends.
    pub length: Duration,
}

/// The faults that follow from a number: the same each time.
pub fn plan(seed: u64, scope: &Scope) -> Vec<Fault> {
    let mut dice = Dice::new(seed);
    let mut faults = Vec::new();
    let mut at = Duration::ZERO;
    loop {
        at += dice.between(scope.apart.0, scope.apart.1);
        if at >= scope.length {
            return faults;
        }
        let target = match dice.below(10) {
            0 | 1 => Target::Brain(dice.below(scope.brains as u64) as usize),
            2..=5 => Target::Hand(dice.below(scope.hands as u64) as usize),
            6 => Target::Coordinator(dice.below(scope.coordinators as u64) as usize),
            7 => Target::Dispatcher,
            _ if scope.hits_servers => Target::Server(dice.below(scope.servers as u64) as usize),
            _ => Target::Hand(dice.below(scope.hands as u64) as usize),
        };
        let action = if dice.below(5) < 3 { Action::Kill } else { Action::Pause };
        let lasts = match action {
            Action::Kill => dice.between(Duration::from_millis(100), Duration::from_millis(1500)),
            Action::Pause => dice.between(scope.pauses.0, scope.pauses.1),
        };
        faults.push(Fault { at, target, action, lasts });
    }
}

/// Counters of processes that are gone, and what happened.
#[derive(Debug, Default)]
pub struct Tally {
    /// Faults by what happened to whom.
    pub faults: BTreeMap<String, u64>,
    counters: BTreeMap<&'static str, u64>,
}

/// Counters that are added up over all processes.
const COUNTERS: [&str; 8] = [
    "efferent_images_total",
    "efferent_results_duplicate_total",
    "efferent_redeliveries_total",
    "efferent_tasks_dropped_total",
    "efferent_dead_letters_total",
    "efferent_hand_checkpoints_total",
    "efferent_hand_resumes_total",
    "efferent_hand_steps_saved_total",
];

impl Tally {
    fn gather(&mut self, process: &Process) {
        for name in COUNTERS {
            *self.counters.entry(name).or_default() += process.counter(name);
        }
    }

    /// A counter's sum. What a process counted since it was last asked is missing if it was killed.
    pub fn counter(&self, name: &str) -> u64 {
        self.counters.get(name).copied().unwrap_or(0)
    }
}

/// A place that a process takes, and the next one after it.
#[derive(Debug)]
struct Place {
    role: &'static str,
    args: Vec<String>,
    process: Slot<Option<Process>>,
}

/// A cluster whose processes are killed and paused, and come back.
#[derive(Debug, Clone)]
pub struct Battered {
    /// The servers below.
    pub cluster: Arc<Cluster>,
    places: Arc<BTreeMap<Target, Place>>,
    servers: Arc<Vec<Slot<()>>>,
    /// What happened.
    pub tally: Arc<Mutex<Tally>>,
    /// Coordinators.
    pub urls: Vec<String>,
}

impl Battered {
    /// Starts so many of each.
    pub async fn start(cluster: Cluster, scope: &Scope) -> Self {
        let mut places = BTreeMap::new();
        let mut add = |target, role, args| {
            places.insert(target, Place { role, args, process: Slot::new(None) });
        };
        // Hands fetch the signals of every other brain.
        let large =
            |n| if n % 2 == 1 { vec!["--sim-signal-bytes".to_owned(), "600000".to_owned()] } else { Vec::new() };
        (0..scope.brains).for_each(|n| add(Target::Brain(n), "brain", large(n)));
        (0..scope.hands).for_each(|n| add(Target::Hand(n), "hand", Vec::new()));
        let mut urls = Vec::new();
        for n in 0..scope.coordinators {
            let address = format!("127.0.0.1:{}", free_port());
            urls.push(format!("http://{address}"));
            add(Target::Coordinator(n), "coordinator", vec!["--listen".to_owned(), address]);
        }
        let servers = Arc::new((0..scope.servers).map(|_| Slot::new(())).collect());
        let (cluster, places) = (Arc::new(cluster), Arc::new(places));
        let this = Self { cluster, places, servers, tally: Arc::default(), urls };
        for (target, place) in this.places.iter() {
            *place.process.lock().await = Some(this.begin(*target).await);
        }
        this
    }

    async fn begin(&self, target: Target) -> Process {
        let (cluster, places) = (self.cluster.clone(), self.places.clone());
        let start = move || {
            let place = &places[&target];
            let args: Vec<&str> = place.args.iter().map(String::as_str).collect();
            // As whoever looks after processes does.
            for _ in 0..20 {
                match cluster.try_role(place.role, &args) {
                    Ok((process, _)) => return process,
                    Err(why) => eprintln!("{why}; again"),
                }
            }
            panic!("{} does not start\n{}", place.role, cluster.log())
        };
        tokio::task::spawn_blocking(start).await.expect("it starts")
    }

    /// Lets a plan happen, until its end or that of `until`. Afterwards all processes run. `bus` tells who dispatches.
    pub async fn suffer(&self, plan: Vec<Fault>, bus: SharedBus, until: impl Future<Output = ()>) {
        let started = Instant::now();
        let mut happening = JoinSet::new();
        tokio::pin!(until);
        for fault in plan {
            tokio::select! {
                () = tokio::time::sleep_until(started + fault.at) => {}
                () = &mut until => break,
            }
            let (this, bus) = (self.clone(), bus.clone());
            happening.spawn(async move { this.happen(fault, &bus).await });
        }
        while let Some(happened) = happening.join_next().await {
            happened.expect("a fault goes by plan");
        }
    }

    async fn happen(&self, fault: Fault, bus: &SharedBus) {
        eprintln!("{fault}");
        let name =
            format!("{:?} {}", fault.action, format!("{:?}", fault.target).split('(').next().unwrap_or_default());
        *self.tally.lock().expect("is not poisoned").faults.entry(name).or_default() += 1;
        let target = match fault.target {
            Target::Server(index) => return self.hit_server(index, fault).await,
            Target::Dispatcher => self.dispatcher(bus).await,
            target => target,
        };
        let mut slot = self.places[&target].process.lock().await;
        let process = slot.take().expect("it runs");
        match fault.action {
            Action::Kill => {
                self.tally.lock().expect("is not poisoned").gather(&process);
                process.kill();
                tokio::time::sleep(fault.lasts).await;
                *slot = Some(self.begin(target).await);
            }
            Action::Pause => {
                process.signal("STOP");
                tokio::time::sleep(fault.lasts).await;
                process.signal("CONT");
                *slot = Some(process);
            }
        }
    }

    async fn hit_server(&self, index: usize, fault: Fault) {
        // One at a time.
        let mut whole = Vec::new();
        for server in self.servers.iter() {
            whole.push(server.lock().await);
        }
        match fault.action {
            Action::Kill => {
                self.cluster.kill_server(index);
                tokio::time::sleep(fault.lasts).await;
                self.cluster.start_server(index);
            }
            Action::Pause => {
                self.cluster.signal_server(index, "STOP");
                tokio::time::sleep(fault.lasts).await;
                self.cluster.signal_server(index, "CONT");
            }
        }
    }

    /// The coordinator that holds the dispatcher's lease, as far as can be told now.
    async fn dispatcher(&self, bus: &SharedBus) -> Target {
        let lease = tokio::time::timeout(Duration::from_secs(1), bus.get(Bucket::Leases, "dispatcher")).await;
        let holder = match lease {
            Ok(Ok(Some(entry))) => String::from_utf8_lossy(&entry.value).parse::<u32>().ok(),
            _ => None,
        };
        for (target, place) in self.places.iter() {
            let is_it = |process: &Option<Process>| process.as_ref().map(Process::pid) == holder && holder.is_some();
            if place.process.try_lock().is_ok_and(|process| is_it(&process)) {
                return *target;
            }
        }
        Target::Coordinator(0)
    }

    /// Stops all processes gracefully and returns what they had counted; whether each reported success.
    pub async fn stop(&self) -> bool {
        let mut well = true;
        for place in self.places.values() {
            let process = place.process.lock().await.take().expect("it runs");
            self.tally.lock().expect("is not poisoned").gather(&process);
            well &= tokio::task::spawn_blocking(move || process.terminate()).await.expect("it stops");
        }
        well
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_plan_follows_from_its_seed() {
        let second = Duration::from_secs(1);
        let scope = Scope {
            brains: 2,
            hands: 3,
            coordinators: 2,
            servers: 1,
            apart: (second / 10, second),
            hits_servers: true,
            pauses: (second * 3, second * 4),
            length: second * 600,
        };
        let faults = plan(7, &scope);
        assert_eq!(faults, plan(7, &scope));
        assert_ne!(faults, plan(8, &scope));
        let hits = |wanted: fn(&Fault) -> bool| faults.iter().filter(|fault| wanted(fault)).count();
        assert!(hits(|fault| fault.target == Target::Server(0)) > 50);
        assert!(hits(|fault| fault.target == Target::Hand(2)) > 50);
        assert!(hits(|fault| fault.target == Target::Dispatcher && fault.action == Action::Pause) > 10);
        assert!(faults.windows(2).all(|pair| pair[0].at < pair[1].at));
    }
}
