//! Every cut of a trace with several states each, tried in parallel until the time is over
//! or one of them is wrong.

use super::check::check;
use super::expect::Expect;
use super::image::{Choice, Image};
use super::model::Model;
use super::random::Random;
use super::site::Site;
use super::trace::{Entry, Trace};
use std::collections::HashSet;
use std::fmt;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// A state that was wrong.
pub struct Failure {
    choice: Choice,
    seed: u64,
    before: Vec<String>,
    problem: String,
    listing: String,
}

/// What was tried.
pub struct Tried {
    cuts: usize,
    extremes: usize,
    chosen: usize,
}

impl fmt::Display for Tried {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Tried { cuts, extremes, chosen } = self;
        write!(
            f,
            "{cuts} cuts, {extremes} different extremes of them (one of {} was tried), {chosen} states by \
             chance (seed {})",
            one_of(),
            seed()
        )
    }
}

/// A moment at which the power is cut.
struct Cut {
    /// How many entries of the trace were done.
    done: usize,
    model: Model,
    expect: Arc<Expect>,
}

/// A state to be tried.
struct Job {
    done: usize,
    choice: Choice,
    seed: u64,
    image: Image,
    expect: Arc<Expect>,
}

/// What is tried of a trace.
pub struct Scope {
    /// Cuts before this entry are left out.
    pub from: usize,
    /// One of so many extremes is tried: which ones, the seed says.
    pub one_of: u64,
    /// How long states chosen by chance are tried.
    pub by_chance: Duration,
}

/// Tries the cuts of the part of `trace` that is of interest.
pub fn explore(trace: &Trace, scope: &Scope) -> Result<Tried, Failure> {
    let Scope { from, one_of, by_chance: time } = *scope;
    let cuts = cuts(trace, from.max(trace.start));
    let mut plan = Plan { cuts: &cuts, seen: HashSet::new(), random: Random::new(seed()), next: 0 };
    let mut extremes = plan.extremes();
    let mut number = seed();
    extremes.retain(|_| {
        number = number.wrapping_add(1);
        number.is_multiple_of(one_of)
    });
    let count = extremes.len();
    let jobs = Mutex::new(extremes.into_iter());
    run(trace, || lock(&jobs).next())?;
    let end = Instant::now() + time;
    let chosen = Mutex::new(0);
    let plan = Mutex::new(plan);
    run(trace, || {
        let job = (Instant::now() < end).then(|| lock(&plan).by_chance()).flatten()?;
        *lock(&chosen) += 1;
        Some(job)
    })?;
    Ok(Tried { cuts: cuts.len(), extremes: count, chosen: *lock(&chosen) })
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

pub fn number(variable: &str) -> Option<u64> {
    let text = std::env::var(variable).ok()?;
    Some(text.parse().unwrap_or_else(|_| panic!("{variable} is a number, not {text:?}")))
}

pub fn seed() -> u64 {
    number("POWER_CUT_SEED").unwrap_or(1)
}

/// Of how many extremes one is tried where nothing is expected to be wrong.
pub fn one_of() -> u64 {
    number("POWER_CUT_ONE_OF").unwrap_or(1).max(1)
}

/// How long states chosen by chance are tried where nothing is expected to be wrong.
pub fn time_by_chance() -> Duration {
    Duration::from_secs(number("POWER_CUT_SECONDS").unwrap_or(2))
}

fn cuts(trace: &Trace, from: usize) -> Vec<Cut> {
    let (mut model, mut expect) = (Model::new(trace.top), Arc::new(Expect::default()));
    let mut cuts = Vec::new();
    for (done, entry) in trace.entries.iter().enumerate() {
        if done >= from {
            cuts.push(Cut { done, model: model.clone(), expect: expect.clone() });
        }
        match entry {
            Entry::Op(op) => model.apply(op),
            Entry::Mark(mark) => (mark.apply)(Arc::make_mut(&mut expect)),
        }
    }
    cuts.push(Cut { done: trace.entries.len(), model, expect });
    cuts
}

/// What is to be tried.
struct Plan<'a> {
    cuts: &'a [Cut],
    /// States that were taken already, with what was expected of them.
    seen: HashSet<(u64, u64)>,
    random: Random,
    next: usize,
}

impl Plan<'_> {
    fn extremes(&mut self) -> Vec<Job> {
        let all = self.cuts.iter().flat_map(|cut| Choice::EXTREMES.map(|choice| (cut, choice)));
        all.filter_map(|(cut, choice)| self.job(cut, choice, 0)).collect()
    }

    /// A state that was not tried yet, of one cut after the other; `None` if none turns up.
    fn by_chance(&mut self) -> Option<Job> {
        for _ in 0..20 * self.cuts.len() {
            let cut = &self.cuts[self.next % self.cuts.len()];
            // A stride without a common factor with the number of cuts would visit all;
            // near enough is good enough.
            self.next += 7;
            let seed = self.random.next();
            if let Some(job) = self.job(cut, Choice::CHANCE, seed) {
                return Some(job);
            }
        }
        None
    }

    fn job(&mut self, cut: &Cut, choice: Choice, seed: u64) -> Option<Job> {
        let image = Image::choose(&cut.model, choice, &mut Random::new(seed));
        let mut hasher = DefaultHasher::new();
        cut.expect.hash(&mut hasher);
        let new = self.seen.insert((image.fingerprint(), hasher.finish()));
        new.then(|| Job { done: cut.done, choice, seed, image, expect: cut.expect.clone() })
    }
}

/// Tries states until there are no more, or one is wrong.
fn run(trace: &Trace, next: impl Fn() -> Option<Job> + Sync) -> Result<(), Failure> {
    let failure = Mutex::new(None);
    let work = || {
        while lock(&failure).is_none()
            && let Some(job) = next()
        {
            if let Err(problem) = attempt(&job) {
                *lock(&failure) = Some(job.failure(trace, problem));
            }
        }
    };
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    std::thread::scope(|scope| (0..threads).for_each(|_| drop(scope.spawn(work))));
    match failure.into_inner().unwrap_or_else(PoisonError::into_inner) {
        Some(failure) => Err(failure),
        None => Ok(()),
    }
}

fn attempt(job: &Job) -> Result<(), String> {
    let site = Site::new();
    job.image.write(site.top()).map_err(|e| format!("make the state: {e}"))?;
    check(&site, &job.expect, job.image.fingerprint().is_multiple_of(2))
}

impl Job {
    fn failure(&self, trace: &Trace, problem: String) -> Failure {
        let mut before = trace.lines();
        before.truncate(self.done);
        let before = before.split_off(before.len().saturating_sub(25));
        Failure { choice: self.choice, seed: self.seed, before, problem, listing: self.image.listing() }
    }
}

impl fmt::Debug for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "after a power cut: {}", self.problem)?;
        let Choice { data, names } = self.choice;
        writeln!(f, "What was not durable: of data {data:?}, of names {names:?}, seed {:#x}", self.seed)?;
        writeln!(f, "The last operations before it:\n  {}", self.before.join("\n  "))?;
        write!(f, "The state:\n{}", self.listing)
    }
}
