//! Asking for a data key where several KMS keys wrap it: one after the other, until one gives it.

use crate::base::Kind;
use crate::catalog::metadata::{KeyOwner, KeyRecord};
use crate::config::Settings;
use crate::kms::patience::Patience;
use crate::kms::{Failure, KmsKey, order};
use std::time::{Duration, Instant};

/// For how long each KMS is asked again in the second round, and in those after it.
const SLICE: Duration = Duration::from_secs(5);
/// The pause between two rounds.
const PAUSE: Duration = Duration::from_millis(200);

/// Why a slot was not usable.
pub enum Refused {
    /// Another slot may be.
    Here(Failure),
    /// It is not the slot that is in the way: no other one would do better.
    Everywhere(Failure),
}

impl<E: Into<Failure>> From<E> for Refused {
    fn from(e: E) -> Self {
        Refused::Here(e.into())
    }
}

/// What a slot gave.
pub struct Given<T> {
    /// What it is.
    pub what: T,
    /// Which slot it was.
    pub slot: usize,
    /// Those that were asked before, and have not given it: each KMS key with its answer.
    pub others: Vec<(KmsKey, Failure)>,
}

impl<T> Given<T> {
    /// What the KMS keys that were asked before have answered, in one line; none if the first one gave it.
    pub fn detour(&self) -> Option<String> {
        let said: Vec<String> = self.others.iter().map(|(key, e)| format!("{key}: {}", e.cause)).collect();
        (!said.is_empty()).then(|| said.join("; "))
    }
}

/// Asks the KMS keys that wrap a data key of `owner`, each by `ask`, until one gives what is wanted: first
/// all of them once, in this `order` of their numbers. Those whose KMS was not reached are asked again, in
/// turns, until `patience` ends. `ask` is told which slot is meant, and how patient to be.
///
/// # Errors
/// With one slot, its refusal. With several, a refusal that names the answer of each.
pub fn ask_each<T>(
    owner: &KeyOwner,
    keys: &[KmsKey],
    order: Vec<usize>,
    patience: Patience,
    mut ask: impl FnMut(usize, Patience) -> Result<T, Refused>,
) -> Result<Given<T>, Failure> {
    if keys.len() == 1 {
        return match ask(0, patience) {
            Ok(what) => Ok(Given { what, slot: 0, others: Vec::new() }),
            Err(Refused::Here(e) | Refused::Everywhere(e)) => Err(e),
        };
    }
    let until = Instant::now() + patience.0;
    let mut refusals: Vec<(usize, Failure)> = Vec::new();
    let mut round = order;
    let mut patience = Patience(Duration::ZERO);
    loop {
        for &slot in &round {
            let e = match ask(slot, patience) {
                Ok(what) => {
                    let others = refusals.into_iter().filter(|(other, _)| *other != slot);
                    let others = others.map(|(n, e)| (keys[n].clone(), e)).collect();
                    return Ok(Given { what, slot, others });
                }
                Err(Refused::Here(e)) => e,
                Err(Refused::Everywhere(e)) => return Err(e),
            };
            log::warn!("{owner}: {} does not give its data key: {}", keys[slot], e.cause);
            match refusals.iter_mut().find(|(other, _)| *other == slot) {
                Some(before) => before.1 = e,
                None => refusals.push((slot, e)),
            }
        }
        let later = |slot: &usize| {
            let is_later = |(n, e): &(usize, Failure)| n == slot && e.error.kind() == Kind::KmsUnavailable;
            refusals.iter().any(is_later)
        };
        round.retain(later);
        let left = until.saturating_duration_since(Instant::now());
        if round.is_empty() || left.is_zero() {
            let refusals = refusals.into_iter().map(|(n, e)| (keys[n].clone(), e));
            return Err(Failure::of_all(refusals.collect()));
        }
        patience = Patience(left.min(SLICE));
        // Whoever is asked again has a moment, also where its refusal took none.
        std::thread::sleep(left.min(PAUSE));
    }
}

/// The numbers of a data key's slots in the order in which the settings have their KMS keys asked.
pub fn asked(key: &KeyRecord, settings: &Settings) -> Vec<usize> {
    order::asked(&key.kms_keys(), &settings.key_order)
}

/// As [`ask_each`], in the order and with the patience of the settings.
///
/// # Errors
/// As [`ask_each`].
pub(super) fn ask_slots<T>(
    settings: &Settings,
    owner: KeyOwner,
    key: &KeyRecord,
    ask: impl FnMut(usize, Patience) -> Result<T, Refused>,
) -> Result<Given<T>, Failure> {
    let patience = Patience(settings.kms_patience);
    ask_each(&owner, &key.kms_keys(), asked(key, settings), patience, ask)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::base::Error;
    use crate::catalog::VolumeId;

    fn keys(n: usize) -> Vec<KmsKey> {
        (0..n).map(|n| KmsKey { provider: "aws".into(), key_id: format!("arn:{n}") }).collect()
    }

    fn refusal(kind: Kind, words: &str) -> Failure {
        Failure { cause: words.into(), error: Error::new(kind, format!("{words}, and advice")), key_id: None }
    }

    fn ask(
        keys: &[KmsKey],
        patience: Patience,
        ask: impl FnMut(usize, Patience) -> Result<&'static str, Refused>,
    ) -> Result<Given<&'static str>, Failure> {
        ask_each(&KeyOwner::Volume(VolumeId::random()), keys, (0..keys.len()).collect(), patience, ask)
    }

    #[test]
    fn one_key_is_asked_as_patiently_as_is_wanted_and_speaks_for_itself() {
        let patience = Patience(Duration::from_secs(60));
        let e = ask(&keys(1), patience, |slot, given| {
            assert_eq!((slot, given), (0, patience));
            Err(refusal(Kind::KmsRefused, "it is disabled").into())
        });
        let e = e.err().unwrap();
        assert_eq!(
            (e.cause.as_str(), e.error.to_string()),
            ("it is disabled", "it is disabled, and advice".into())
        );
    }

    #[test]
    fn the_next_is_asked_at_once_and_those_before_are_named() {
        let mut asked = Vec::new();
        let given = ask(&keys(3), Patience(Duration::from_secs(60)), |slot, patience| {
            asked.push(slot);
            assert!(patience.0.is_zero());
            match slot {
                0 => Err(refusal(Kind::KmsUnavailable, "not reached").into()),
                1 => Ok("key"),
                _ => unreachable!(),
            }
        });
        let given = given.ok().unwrap();
        assert_eq!((given.what, given.slot, &asked[..]), ("key", 1, &[0, 1][..]));
        assert_eq!(given.detour().unwrap(), "aws:arn:0: not reached");
    }

    #[test]
    fn only_who_was_not_reached_is_asked_again() {
        let mut asked = Vec::new();
        let given = ask(&keys(2), Patience(Duration::from_secs(600)), |slot, _| {
            asked.push(slot);
            match (slot, asked.len()) {
                (0, _) => Err(refusal(Kind::KmsRefused, "disabled").into()),
                (_, 2..5) => Err(refusal(Kind::KmsUnavailable, "not reached").into()),
                _ => Ok("key"),
            }
        });
        assert_eq!(given.ok().unwrap().detour().unwrap(), "aws:arn:0: disabled");
        assert_eq!(asked, [0, 1, 1, 1, 1]);
    }

    #[test]
    fn a_refusal_names_the_answer_of_each() {
        let answers =
            [(Kind::KmsRefused, "disabled"), (Kind::KmsUnavailable, "not reached"), (Kind::Corrupt, "bad")];
        let e = ask(&keys(3), Patience(Duration::ZERO), |slot, _| {
            let (kind, words) = answers[slot];
            Err(refusal(kind, words).into())
        });
        let e = e.err().unwrap();
        assert_eq!(e.error.kind(), Kind::KmsUnavailable, "a later try may succeed");
        assert_eq!(e.cause, "aws:arn:0: disabled; aws:arn:1: not reached; aws:arn:2: bad");
        assert!(
            e.error
                .to_string()
                .starts_with("none of the 3 KMS keys gives the data key: aws:arn:0: disabled, and")
        );
    }

    #[test]
    fn what_no_other_slot_would_change_ends_it() {
        let mut asked = 0;
        let e = ask(&keys(3), Patience(Duration::from_secs(60)), |_, _| {
            asked += 1;
            Err(Refused::Everywhere(refusal(Kind::KmsRefused, "the target")))
        });
        assert_eq!((e.err().unwrap().cause.as_str(), asked), ("the target", 1));
    }
}
