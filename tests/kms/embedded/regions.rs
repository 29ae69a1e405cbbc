//! Multi-Region keys in the stores of several regions. What goes from one to another is carried here by hand,
//! so that each step can be left out, done twice, or changed on the way.

use crate::common::patience::limit;
use crate::embedded::hands::{DAY, Hands};
use crate::embedded::import::wrap;
use crate::embedded::{Place, volume};
use sealblk::base::Locality;
use sealblk::kms::embedded::Embedded;
use sealblk::kms::embedded::admin::{KeyMetadata, NewKey};
use sealblk::kms::embedded::clock::Clock;
use sealblk::kms::embedded::import::WrappingKeySpec;
use sealblk::kms::embedded::synchronization::{Message, NewReplica};
use sealblk::kms::{KeyState, KmsError};
use std::fs;
use std::time::Duration;

const HOME: &str = "us-east-1";
const FAR: &str = "eu-west-1";
const THIRD: &str = "ap-south-1";

/// The store of one region.
struct Region {
    place: Place,
    name: &'static str,
    clock: Hands,
}

impl Region {
    fn new(name: &'static str) -> Self {
        Region { place: Place::new(), name, clock: Hands::new() }
    }

    fn open(&self) -> Embedded {
        let here = Locality { region: self.name.into(), account: "000000000000".into() };
        let hardened = sealblk::base::hardened::harden().unwrap();
        Embedded::in_place(
            self.place.data(),
            self.place.config(),
            Box::new(self.clock.clone()),
            here,
            hardened,
        )
    }
}

fn multi_region(kms: &Embedded) -> KeyMetadata {
    kms.create(&NewKey { multi_region: true, ..NewKey::default() }).unwrap()
}

fn id(key: &KeyMetadata) -> String {
    key.arn.rsplit('/').next().unwrap().to_owned()
}

/// A message of `from` for `to`, which it has not taken yet.
struct Carried {
    token: Vec<u8>,
    message: Message,
    generation: u64,
}

/// What `from` has to say of the key, under a key that `to` has given; `None` if `to` has it.
fn carry(
    (from, from_name): (&Embedded, &str),
    (to, to_name): (&Embedded, &str),
    key: &KeyMetadata,
    new: Option<&NewReplica>,
) -> Result<Option<Carried>, KmsError> {
    let wanted = from.generation_for(key.id, to_name)?;
    let parameters = to.synchronization_parameters(from_name, &id(key), wanted, new.is_some())?;
    let Some(wrapping) = parameters.wrapping else { return Ok(None) };
    let (message, generation) = from.message_for(key.id, to_name, &wrapping, new)?;
    Ok(Some(Carried { token: wrapping.token, message, generation }))
}

/// Brings what `from` has to `to`, and tells `from`.
fn bring(
    from: (&Embedded, &str),
    to: (&Embedded, &str),
    key: &KeyMetadata,
    new: Option<&NewReplica>,
) -> Result<KeyMetadata, KmsError> {
    if let Some(carried) = carry(from, to, key, new)? {
        to.0.receive(from.1, &id(key), &carried.token, &carried.message)?;
        from.0.note_synchronized(key.id, to.1, carried.generation)?;
    }
    to.0.key(&id(key))
}

fn replicate(from: (&Embedded, &str), to: (&Embedded, &str), key: &KeyMetadata) -> KeyMetadata {
    from.0.begin_replication(&key.arn, to.1).unwrap();
    bring(from, to, key, Some(&NewReplica::default())).unwrap()
}

fn catch_up(from: (&Embedded, &str), to: (&Embedded, &str), key: &KeyMetadata) {
    while from.0.replicas_behind().unwrap().iter().any(|it| it.region == to.1) {
        bring(from, to, key, None).unwrap();
    }
}

/// Whether what each encrypts the other decrypts.
#[track_caller]
fn are_one(one: &Embedded, other: &Embedded, key: &KeyMetadata) {
    for (from, to) in [(one, other), (other, one)] {
        let sealed = from.encrypt(&id(key), b"secret", &volume("v")).unwrap();
        let opened = to.open_blob(Some(&id(key)), &sealed.blob, &volume("v")).unwrap();
        assert_eq!((&opened.plaintext[..], opened.material), (&b"secret"[..], sealed.material));
        assert_eq!(opened.key, to.key(&id(key)).unwrap().arn);
        assert_eq!(to.open_blob(None, &sealed.blob, &volume("w")).err(), Some(KmsError::InvalidCiphertext));
    }
}

#[test]
fn what_one_region_encrypts_its_replica_decrypts_and_the_rest_is_each_one_s_own() {
    let (home, far) = (Region::new(HOME), Region::new(FAR));
    let (one, other) = (home.open(), far.open());
    let key = multi_region(&one);
    assert!(id(&key).starts_with("mrk-") && id(&key).len() == 36, "{}", key.arn);
    one.create_alias("alias/a", &key.arn).unwrap();
    let before = one.encrypt(&key.arn, b"before", &volume("v")).unwrap();
    let new = NewReplica { description: "far".into(), tags: vec![("t".into(), "v".into())], policy: None };
    one.begin_replication(&key.arn, FAR).unwrap();
    let replica = bring((&one, HOME), (&other, FAR), &key, Some(&new)).unwrap();
    assert_eq!(replica.arn, format!("arn:aws:kms:{FAR}:000000000000:key/{}", id(&key)));
    assert_eq!((replica.description.as_str(), replica.aliases.len()), ("far", 0));
    assert_eq!(other.tags(&replica.arn).unwrap(), [("t".into(), "v".into())].into());
    assert_eq!(*other.open_blob(None, &before.blob, &volume("v")).unwrap().plaintext, b"before");
    are_one(&one, &other, &key);

    // The state of one is not that of the other.
    one.disable(&key.arn).unwrap();
    assert_eq!(other.key(&replica.arn).unwrap().state, KeyState::Enabled);
    assert!(other.open_blob(None, &before.blob, &volume("v")).is_ok());
    one.enable(&key.arn).unwrap();

    let (one, other) = (home.open(), far.open());
    are_one(&one, &other, &key);
    let [at_home, at_far] = [&one, &other].map(|kms| kms.key(&id(&key)).unwrap().multi_region.unwrap());
    assert!(at_home.is_primary && !at_far.is_primary);
    assert_eq!((&at_home.primary, &at_home.replicas), (&at_far.primary, &at_far.replicas));
    assert_eq!(at_far.primary.arn, key.arn);
    assert_eq!(at_home.replicas.iter().map(|it| &*it.arn).collect::<Vec<_>>(), [&*replica.arn]);
}

#[test]
fn only_an_enabled_primary_key_of_several_regions_is_replicated() {
    let (home, far) = (Region::new(HOME), Region::new(FAR));
    let (one, other) = (home.open(), far.open());
    let single = one.create_key("", None).unwrap();
    let unsupported = |result: Result<_, KmsError>| {
        assert!(matches!(result, Err(KmsError::Unsupported(_))), "{:?}", result.err());
    };
    unsupported(one.begin_replication(&single.arn, FAR).map(drop));
    unsupported(one.begin_move(&single.arn, FAR).map(drop));
    unsupported(
        one.create(&NewKey { multi_region: true, key_store: Some("x"), ..NewKey::default() }).map(drop),
    );
    let key = multi_region(&one);
    assert_eq!(one.begin_replication(&key.arn, HOME).unwrap_err().type_name(), "AlreadyExistsException");
    one.disable(&key.arn).unwrap();
    assert_eq!(one.begin_replication(&key.arn, FAR).unwrap_err().type_name(), "DisabledException");
    one.enable(&key.arn).unwrap();
    let replica = replicate((&one, HOME), (&other, FAR), &key);
    assert_eq!(one.begin_replication(&key.arn, FAR).unwrap_err().type_name(), "AlreadyExistsException");
    unsupported(other.begin_replication(&replica.arn, THIRD).map(drop));
    unsupported(other.begin_move(&replica.arn, HOME).map(drop));
    unsupported(other.rotate_on_demand(&replica.arn).map(drop));
    unsupported(other.enable_rotation(&replica.arn, 90));
    unsupported(other.disable_rotation(&replica.arn));
    assert_eq!(one.begin_move(&key.arn, THIRD).unwrap_err().type_name(), "NotFoundException");
}

#[test]
fn a_new_version_encrypts_nowhere_before_it_decrypts_everywhere() {
    let (home, far, third) = (Region::new(HOME), Region::new(FAR), Region::new(THIRD));
    let (one, two, three) = (home.open(), far.open(), third.open());
    let key = multi_region(&one);
    replicate((&one, HOME), (&two, FAR), &key);
    replicate((&one, HOME), (&three, THIRD), &key);
    catch_up((&one, HOME), (&two, FAR), &key);
    catch_up((&one, HOME), (&three, THIRD), &key);
    let material = |kms: &Embedded| kms.encrypt(&id(&key), b"x", &volume("v")).unwrap().material;
    let first = material(&one);

    one.rotate_on_demand(&key.arn).unwrap();
    assert_eq!(one.versions(&key.arn).unwrap().len(), 2);
    assert_eq!(one.rotate_on_demand(&key.arn).unwrap_err().type_name(), "ConflictException");
    bring((&one, HOME), (&two, FAR), &key, None).unwrap();
    for kms in [&one, &two, &three] {
        assert_eq!(material(kms), first, "one region lacks the new version");
    }
    bring((&one, HOME), (&three, THIRD), &key, None).unwrap();
    let second = material(&one);
    assert_ne!(second, first);
    // The others were not told yet that all have it. Each decrypts what the other encrypts all the same.
    assert_eq!((material(&two), material(&three)), (first.clone(), first));
    are_one(&one, &two, &key);
    are_one(&two, &three, &key);
    catch_up((&one, HOME), (&two, FAR), &key);
    catch_up((&one, HOME), (&three, THIRD), &key);
    assert_eq!((material(&two), material(&three)), (second.clone(), second));
    are_one(&two, &three, &key);
}

#[test]
fn the_primary_key_alone_is_rotated_by_its_period() {
    let (home, far) = (Region::new(HOME), Region::new(FAR));
    let (one, other) = (home.open(), far.open());
    let key = multi_region(&one);
    replicate((&one, HOME), (&other, FAR), &key);
    one.enable_rotation(&key.arn, 90).unwrap();
    catch_up((&one, HOME), (&other, FAR), &key);
    assert_eq!(other.rotation_status(&id(&key)).unwrap().automatic.unwrap().0, 90);
    for clock in [&home.clock, &far.clock] {
        clock.pass(91 * DAY);
    }
    assert_eq!(other.versions(&id(&key)).unwrap().len(), 1);
    assert_eq!(one.versions(&id(&key)).unwrap().len(), 2);
    // However long the other region is away: a version more, and not one a period.
    home.clock.pass(400 * DAY);
    assert_eq!(one.versions(&id(&key)).unwrap().len(), 2);
    catch_up((&one, HOME), (&other, FAR), &key);
    are_one(&one, &other, &key);
    assert_eq!(one.versions(&id(&key)).unwrap().len(), 3, "what was overdue");
}

#[test]
fn the_primary_region_moves_and_whatever_was_interrupted_is_gone_on_with() {
    let (home, far, third) = (Region::new(HOME), Region::new(FAR), Region::new(THIRD));
    let (one, two, three) = (home.open(), far.open(), third.open());
    let key = multi_region(&one);
    for (kms, name) in [(&two, FAR), (&three, THIRD)] {
        replicate((&one, HOME), (kms, name), &key);
    }
    catch_up((&one, HOME), (&two, FAR), &key);
    one.begin_move(&key.arn, FAR).unwrap();
    assert_eq!(one.key(&key.arn).unwrap().state, KeyState::Updating);
    are_one(&one, &two, &key);
    for refused in [
        one.begin_move(&key.arn, THIRD).map(drop),
        one.begin_replication(&key.arn, "r").map(drop),
        one.rotate_on_demand(&key.arn).map(drop),
        one.schedule_deletion(&key.arn, 7).map(drop),
        one.forget_replica(&key.arn, FAR),
    ] {
        assert_eq!(refused.unwrap_err().type_name(), "KMSInvalidStateException");
    }
    // The other region has taken it, and its answer was lost.
    let carried = carry((&one, HOME), (&two, FAR), &key, None).unwrap().unwrap();
    two.receive(HOME, &id(&key), &carried.token, &carried.message).unwrap();
    assert!(two.key(&id(&key)).unwrap().multi_region.unwrap().is_primary);
    one.begin_move(&key.arn, FAR).unwrap();
    assert!(carry((&one, HOME), (&two, FAR), &key, None).unwrap().is_none(), "it has it");
    one.note_synchronized(key.id, FAR, carried.generation).unwrap();
    let at_home = one.key(&key.arn).unwrap();
    assert_eq!(at_home.state, KeyState::Enabled);
    assert!(!at_home.multi_region.unwrap().is_primary);

    // The new primary key tells all others, also the one that heard nothing of the move.
    two.rotate_on_demand(&id(&key)).unwrap();
    for (kms, name) in [(&one, HOME), (&three, THIRD), (&one, HOME), (&three, THIRD)] {
        catch_up((&two, FAR), (kms, name), &key);
    }
    are_one(&one, &three, &key);
    are_one(&one, &two, &key);
    assert_eq!(one.versions(&id(&key)).unwrap().len(), 2);
    let at_third = three.key(&id(&key)).unwrap().multi_region.unwrap();
    assert_eq!(at_third.primary.region, FAR);
    // The region that had it has nothing to say any more.
    let refused = two.receive(HOME, &id(&key), &carried.token, &carried.message).unwrap_err();
    assert_eq!(refused.type_name(), "AccessDeniedException");
}

#[test]
fn a_primary_key_is_deleted_after_its_replicas() {
    let (home, far) = (Region::new(HOME), Region::new(FAR));
    let (one, other) = (home.open(), far.open());
    let key = multi_region(&one);
    replicate((&one, HOME), (&other, FAR), &key);
    let dying = one.schedule_deletion(&key.arn, 7).unwrap();
    assert_eq!((dying.state, dying.deletion), (KeyState::PendingReplicaDeletion, None));
    let words = format!("{} is pending replica deletion.", key.arn);
    assert_eq!(one.encrypt(&key.arn, b"x", &volume("v")), Err(KmsError::PendingDeletion(words.clone())));
    assert_eq!(one.enable(&key.arn).unwrap_err().to_string(), words);
    home.clock.pass(60 * DAY);
    assert_eq!(one.key(&key.arn).unwrap().state, KeyState::PendingReplicaDeletion);
    assert_eq!(one.cancel_deletion(&key.arn).unwrap().state, KeyState::Disabled);
    one.schedule_deletion(&key.arn, 7).unwrap();

    // It asks now and then, and learns nothing while the replica is there.
    assert_eq!(one.replicas_behind().unwrap().len(), 1);
    bring((&one, HOME), (&other, FAR), &key, None).unwrap();
    other.schedule_deletion(&id(&key), 7).unwrap();
    far.clock.pass(8 * DAY);
    let gone = bring((&one, HOME), (&other, FAR), &key, None).unwrap_err();
    assert_eq!(gone.type_name(), "NotFoundException");
    one.note_replica_gone(key.id, FAR).unwrap();
    let dying = one.key(&key.arn).unwrap();
    assert_eq!((dying.state, dying.deletion_days), (KeyState::PendingDeletion, Some(7)));
    home.clock.pass(8 * DAY);
    assert_eq!(one.key(&key.arn).unwrap_err().type_name(), "NotFoundException");
}

#[test]
fn a_replica_that_is_lost_is_forgotten_and_rotation_goes_on() {
    let (home, far) = (Region::new(HOME), Region::new(FAR));
    let (one, other) = (home.open(), far.open());
    let key = multi_region(&one);
    replicate((&one, HOME), (&other, FAR), &key);
    one.rotate_on_demand(&key.arn).unwrap();
    assert_eq!(one.rotate_on_demand(&key.arn).unwrap_err().type_name(), "ConflictException");
    assert_eq!(one.forget_replica(&key.arn, THIRD).unwrap_err().type_name(), "NotFoundException");
    one.forget_replica(&key.arn, FAR).unwrap();
    assert_eq!(one.replicas_behind().unwrap(), []);
    one.rotate_on_demand(&key.arn).unwrap();
    let versions = one.versions(&key.arn).unwrap();
    assert_eq!((versions.len(), versions[2].current), (3, true));
}

/// A store whose last change was never made: of a backup, or of a KMS that somebody rolled back.
fn rolled_back(region: &Region, change: impl FnOnce(&Embedded)) -> Embedded {
    let (log, head) = (region.place.log(), region.place.anchor());
    let kept = [&log, &head].map(|path| fs::read(path).unwrap());
    change(&region.open());
    fs::write(&log, &kept[0]).unwrap();
    fs::write(&head, &kept[1]).unwrap();
    region.open()
}

#[test]
fn no_message_takes_a_version_away_or_goes_back() {
    let (home, far) = (Region::new(HOME), Region::new(FAR));
    let (one, other) = (home.open(), far.open());
    let key = multi_region(&one);
    replicate((&one, HOME), (&other, FAR), &key);
    let one = rolled_back(&home, |one| {
        one.rotate_on_demand(&key.arn).unwrap();
        catch_up((one, HOME), (&other, FAR), &key);
    });
    assert_eq!(other.versions(&id(&key)).unwrap().len(), 2);
    // It has gone back, goes another way, and passes the number that the replica has.
    let mut outcomes = Vec::new();
    for days in [90, 91, 92, 93] {
        one.enable_rotation(&key.arn, days).unwrap();
        let carried = carry((&one, HOME), (&other, FAR), &key, None).unwrap();
        outcomes.extend(
            carried.map(|it| other.receive(HOME, &id(&key), &it.token, &it.message).unwrap_err().type_name()),
        );
    }
    assert!(!outcomes.is_empty() && outcomes.iter().all(|it| *it == "ConflictException"), "{outcomes:?}");
    assert_eq!(other.versions(&id(&key)).unwrap().len(), 2);
}

#[test]
fn a_message_is_for_one_key_one_region_one_token_and_by_the_primary_region() {
    let (home, far, third) = (Region::new(HOME), Region::new(FAR), Region::new(THIRD));
    let (one, other, stranger) = (home.open(), far.open(), third.open());
    let (key, second) = (multi_region(&one), multi_region(&one));
    let new = NewReplica::default();
    one.begin_replication(&key.arn, FAR).unwrap();
    let make = |key: &KeyMetadata| {
        carry((&one, HOME), (&other, FAR), key, Some(&new)).unwrap().expect("it has none")
    };
    let (carried, of_second) = (make(&key), make(&second));
    let refused = |from: &str, key: &KeyMetadata, token: &[u8], message: &Message| {
        other.receive(from, &id(key), token, message).unwrap_err().type_name()
    };
    let validation = "ValidationException";
    assert_eq!(refused(THIRD, &key, &carried.token, &carried.message), validation);
    assert_eq!(refused(HOME, &second, &carried.token, &carried.message), validation);
    assert_eq!(refused(HOME, &key, &of_second.token, &carried.message), validation);
    assert_eq!(refused(HOME, &key, b"", &carried.message), validation);
    let changed = |change: &dyn Fn(&mut Message)| {
        let Message { shared, wrapped_key, material } = &carried.message;
        let mut message =
            Message { shared: shared.clone(), wrapped_key: wrapped_key.clone(), material: material.clone() };
        change(&mut message);
        refused(HOME, &key, &carried.token, &message)
    };
    let bad = "InvalidCiphertextException";
    assert_eq!(changed(&|it| it.material[0] ^= 1), bad);
    assert_eq!(changed(&|it| it.material.truncate(40)), bad);
    assert_eq!(changed(&|it| it.material.clear()), bad);
    assert_eq!(changed(&|it| it.wrapped_key[9] ^= 1), bad);
    assert_eq!(
        changed(&|it| it.shared = it.shared.replace("\"description\":\"\"", "\"description\":\"x\"")),
        bad
    );
    assert_eq!(changed(&|it| it.shared = it.shared.replace(FAR, THIRD)), validation);
    assert_eq!(changed(&|it| it.shared = "{}".into()), validation);
    far.clock.pass(10 * 60_000);
    assert_eq!(refused(HOME, &key, &carried.token, &carried.message), validation, "it has expired");
    assert_eq!(other.keys().unwrap(), []);

    // A stranger has no part in a key that is there, whatever he says.
    replicate((&one, HOME), (&other, FAR), &key);
    let denied = |result: Result<_, KmsError>| {
        assert_eq!(result.unwrap_err().type_name(), "AccessDeniedException");
    };
    denied(other.synchronization_parameters(THIRD, &id(&key), 99, true).map(drop));
    denied(one.synchronization_parameters(THIRD, &id(&key), 99, true).map(drop));
    // Nor does a replica's region tell the primary key's what it is to have.
    let wrapping = one.synchronization_parameters(FAR, &id(&key), 99, true).unwrap().wrapping.unwrap();
    let (message, _) = other.message_for(key.id, HOME, &wrapping, None).unwrap();
    assert!(one.receive(FAR, &id(&key), &wrapping.token, &message).is_err());
    // What to wrap with is a key of a good size.
    let mut small = wrapping.clone();
    small.public_key = one
        .import_parameters(
            &one.create(&NewKey { external: true, ..NewKey::default() }).unwrap().arn,
            WrappingKeySpec::Rsa2048,
        )
        .unwrap()
        .public_key;
    assert!(matches!(one.message_for(key.id, FAR, &small, None), Err(KmsError::Validation(_))));
    drop(stranger);
}

#[test]
fn a_replica_s_region_does_not_make_itself_the_primary_one() {
    let (home, far, third) = (Region::new(HOME), Region::new(FAR), Region::new(THIRD));
    let (one, other, stranger) = (home.open(), far.open(), third.open());
    let key = multi_region(&one);
    replicate((&one, HOME), (&other, FAR), &key);
    // It believes to be, and says so in good form; what it was told is not so.
    let one = rolled_back(&home, |one| {
        one.begin_move(&key.arn, FAR).unwrap();
        bring((one, HOME), (&other, FAR), &key, None).unwrap();
    });
    other.rotate_on_demand(&id(&key)).unwrap();
    let carried = carry((&other, FAR), (&one, HOME), &key, None).unwrap().expect("it has less");
    let refused = one.receive(FAR, &id(&key), &carried.token, &carried.message).unwrap_err();
    assert_eq!(refused.type_name(), "AccessDeniedException");
    assert!(one.key(&key.arn).unwrap().multi_region.unwrap().is_primary);
    // Nor does it bring a key to a third region in the name of the first.
    let wrapping = stranger.synchronization_parameters(FAR, &id(&key), 1, true).unwrap().wrapping.unwrap();
    let (message, _) = one.message_for(key.id, THIRD, &wrapping, Some(&NewReplica::default())).unwrap();
    let refused = stranger.receive(FAR, &id(&key), &wrapping.token, &message).unwrap_err();
    assert_eq!(refused.type_name(), "ValidationException");
    assert_eq!(stranger.keys().unwrap(), []);
}

#[test]
fn two_that_bring_the_same_are_no_conflict() {
    let (home, far) = (Region::new(HOME), Region::new(FAR));
    let (one, other) = (home.open(), far.open());
    let key = multi_region(&one);
    replicate((&one, HOME), (&other, FAR), &key);
    one.rotate_on_demand(&key.arn).unwrap();
    let mut messages = [(); 2].map(|()| carry((&one, HOME), (&other, FAR), &key, None).unwrap().unwrap());
    for Carried { token, message, generation } in &mut messages {
        other.receive(HOME, &id(&key), token, message).unwrap();
        one.note_synchronized(key.id, FAR, *generation).unwrap();
    }
    catch_up((&one, HOME), (&other, FAR), &key);
    are_one(&one, &other, &key);
}

#[test]
fn no_message_has_a_rotation_or_a_time_that_no_kms_makes() {
    let (home, far) = (Region::new(HOME), Region::new(FAR));
    let (one, other) = (home.open(), far.open());
    let key = multi_region(&one);
    replicate((&one, HOME), (&other, FAR), &key);
    one.enable_rotation(&key.arn, 90).unwrap();
    let Carried { token, message, .. } = carry((&one, HOME), (&other, FAR), &key, None).unwrap().unwrap();
    let shared: serde_json::Value = serde_json::from_str(&message.shared).unwrap();
    // Whether its material opens is looked at after that.
    let said = |change: &dyn Fn(&mut serde_json::Value)| {
        let mut shared = shared.clone();
        change(&mut shared);
        let (wrapped_key, material) = (message.wrapped_key.clone(), message.material.clone());
        let message = Message { shared: shared.to_string(), wrapped_key, material };
        other.receive(HOME, &id(&key), &token, &message).unwrap_err().type_name()
    };
    assert_eq!(said(&|it| it["rotation"]["days"] = 2560.into()), "InvalidCiphertextException");
    for days in [0, 1, 89, 2561, u32::MAX] {
        assert_eq!(said(&|it| it["rotation"]["days"] = days.into()), "ValidationException", "{days}");
    }
    for time in [i64::MIN, -1, 253_402_300_800_000, i64::MAX] {
        assert_eq!(said(&|it| it["rotation"]["next"] = time.into()), "ValidationException", "{time}");
        assert_eq!(said(&|it| it["versions"][0]["created"] = time.into()), "ValidationException", "{time}");
    }
    other.receive(HOME, &id(&key), &token, &message).unwrap();
    are_one(&one, &other, &key);
}

#[test]
fn two_that_bring_a_move_are_no_conflict() {
    let (home, far) = (Region::new(HOME), Region::new(FAR));
    let (one, other) = (home.open(), far.open());
    let key = multi_region(&one);
    replicate((&one, HOME), (&other, FAR), &key);
    one.begin_move(&key.arn, FAR).unwrap();
    let messages = [(); 2].map(|()| carry((&one, HOME), (&other, FAR), &key, None).unwrap().unwrap());
    for Carried { token, message, .. } in &messages {
        other.receive(HOME, &id(&key), token, message).unwrap();
    }
    one.note_synchronized(key.id, FAR, messages[1].generation).unwrap();
    let primaries = [&one, &other].map(|kms| kms.key(&id(&key)).unwrap().multi_region.unwrap().is_primary);
    assert_eq!(primaries, [false, true]);
}

#[test]
fn one_at_a_time_tells_other_regions_of_a_key() {
    let home = Region::new(HOME);
    let one = home.open();
    let (key, second) = (multi_region(&one), multi_region(&one));
    let held = one.telling_of(key.id).unwrap();
    let (tell, told) = std::sync::mpsc::channel();
    std::thread::scope(|threads| {
        threads.spawn(|| {
            let other = home.open();
            drop(other.telling_of(second.id).unwrap());
            tell.send("of another key").unwrap();
            drop(other.telling_of(key.id).unwrap());
            tell.send("of this key").unwrap();
        });
        assert_eq!(told.recv_timeout(limit()), Ok("of another key"));
        // The store itself is nobody's meanwhile.
        one.rotate_on_demand(&key.arn).unwrap();
        assert!(told.recv_timeout(Duration::from_millis(200)).is_err());
        drop(held);
        assert_eq!(told.recv_timeout(limit()), Ok("of this key"));
    });
}

#[test]
fn a_move_to_a_replica_that_is_gone_has_come_to_its_end() {
    let (home, far) = (Region::new(HOME), Region::new(FAR));
    let (one, other) = (home.open(), far.open());
    let key = multi_region(&one);
    replicate((&one, HOME), (&other, FAR), &key);
    one.begin_move(&key.arn, FAR).unwrap();
    one.note_replica_gone(key.id, FAR).unwrap();
    let here = one.key(&key.arn).unwrap();
    assert_eq!(here.state, KeyState::Enabled);
    assert!(here.multi_region.unwrap().is_primary);
    one.rotate_on_demand(&key.arn).unwrap();
}

#[test]
fn a_number_that_a_replica_has_already_is_not_taken_for_what_stands_behind_it() {
    let (home, far) = (Region::new(HOME), Region::new(FAR));
    let (one, other) = (home.open(), far.open());
    let key = multi_region(&one);
    replicate((&one, HOME), (&other, FAR), &key);
    let before = other.synchronization_parameters(HOME, &id(&key), 1, false).unwrap();
    one.note_parameters(key.id, FAR, &before).unwrap();
    let one = rolled_back(&home, |one| {
        one.rotate_on_demand(&key.arn).unwrap();
        catch_up((one, HOME), (&other, FAR), &key);
    });
    let has = other.synchronization_parameters(HOME, &id(&key), 1, false).unwrap();
    let is_refused = |kms: &Embedded| {
        kms.note_parameters(key.id, FAR, &has).unwrap_err().type_name() == "ConflictException"
    };
    assert!(is_refused(&one), "it has more");
    one.rotate_on_demand(&key.arn).unwrap();
    while one.generation_for(key.id, FAR).unwrap() < has.generation {
        let days = 90 + u32::try_from(one.generation_for(key.id, FAR).unwrap()).unwrap();
        one.enable_rotation(&key.arn, days).unwrap();
    }
    // The same number, by other changes.
    assert_eq!(one.generation_for(key.id, FAR).unwrap(), has.generation);
    assert!(carry((&one, HOME), (&other, FAR), &key, None).unwrap().is_none());
    assert!(is_refused(&one), "it has something else");
    assert_eq!(one.key(&key.arn).unwrap().multi_region.unwrap().behind, [FAR]);
    let current = one.versions(&key.arn).unwrap().iter().position(|version| version.current);
    assert_eq!(current, Some(0), "a version encrypts that the other region lacks");
}

#[test]
fn a_primary_key_is_elsewhere_once_that_region_says_so() {
    let (home, far) = (Region::new(HOME), Region::new(FAR));
    let (one, other) = (home.open(), far.open());
    let key = multi_region(&one);
    replicate((&one, HOME), (&other, FAR), &key);
    one.begin_move(&key.arn, FAR).unwrap();
    let carried = carry((&one, HOME), (&other, FAR), &key, None).unwrap().unwrap();
    other.receive(HOME, &id(&key), &carried.token, &carried.message).unwrap();
    let wanted = one.generation_for(key.id, FAR).unwrap();
    let mut has = other.synchronization_parameters(HOME, &id(&key), wanted, false).unwrap();
    assert!(has.is_primary && has.generation == wanted);
    // It has gone on meanwhile.
    other.enable_rotation(&id(&key), 90).unwrap();
    let later = other.synchronization_parameters(HOME, &id(&key), wanted, false).unwrap();
    assert!(later.generation > wanted);
    has.is_primary = false;
    has.generation = later.generation;
    assert_eq!(one.note_parameters(key.id, FAR, &has).unwrap_err().type_name(), "ConflictException");
    one.note_parameters(key.id, FAR, &later).unwrap();
    assert!(!one.key(&key.arn).unwrap().multi_region.unwrap().is_primary);
}

#[test]
fn a_key_stays_in_the_region_that_it_was_made_in() {
    let (home, far) = (Region::new(HOME), Region::new(FAR));
    let key = multi_region(&home.open());
    replicate((&home.open(), HOME), (&far.open(), FAR), &key);
    home.open().check_regions().unwrap();
    home.open().enable_rotation(&key.arn, 90).unwrap();
    for region in [home, far] {
        let Region { place, name, clock } = region;
        let moved = Region { place, name: THIRD, clock };
        moved.clock.pass(91 * DAY);
        let kms = moved.open();
        let refused = |result: Result<(), KmsError>| {
            let e = result.unwrap_err();
            assert_eq!(e.type_name(), "KMSInvalidStateException");
            assert!(e.to_string().contains("\"region\" in the settings is ap-south-1"), "{e}");
        };
        refused(kms.check_regions());
        refused(kms.rotate_on_demand(&id(&key)).map(drop));
        refused(kms.begin_replication(&id(&key), HOME).map(drop));
        refused(kms.synchronization_parameters(HOME, &id(&key), 99, false).map(drop));
        assert_eq!(kms.versions(&id(&key)).unwrap().len(), 1);
        // What it has it still opens.
        kms.encrypt(&id(&key), b"x", &volume("v")).unwrap();
        let back = Region { name, ..moved };
        let again = back.open();
        again.check_regions().unwrap();
        assert_eq!(again.versions(&id(&key)).unwrap().len(), if name == HOME { 2 } else { 1 });
    }
}

/// The wrapped form that `import` takes.
fn give(kms: &Embedded, key: &str, material: u8, expires: Option<i64>) -> Result<String, KmsError> {
    let given = kms.import_parameters(key, WrappingKeySpec::Rsa2048)?;
    let wrapped = wrap(&given, &[material; 32]);
    kms.import(key, &given.token, &wrapped, expires).map(|imported| imported.material)
}

#[test]
fn imported_material_goes_nowhere_and_each_region_takes_the_same_alone() {
    let (home, far) = (Region::new(HOME), Region::new(FAR));
    let (one, other) = (home.open(), far.open());
    let key = one.create(&NewKey { multi_region: true, external: true, ..NewKey::default() }).unwrap();
    assert_eq!(key.state, KeyState::PendingImport);
    let replica = replicate((&one, HOME), (&other, FAR), &key);
    assert_eq!((replica.state, replica.origin), (KeyState::PendingImport, "EXTERNAL"));
    let refused = |kms: &Embedded, material: u8| {
        let e = give(kms, &id(&key), material, None).unwrap_err();
        assert_eq!(e.type_name(), "IncorrectKeyMaterialException", "{e}");
        e.to_string()
    };
    let said = refused(&other, 7);
    assert!(said.contains(&format!("No key material is known of {} yet", key.arn)), "{said}");
    let material = give(&one, &id(&key), 7, None).unwrap();
    // It has not heard of it.
    assert!(refused(&other, 7).contains("has not heard of it yet"));
    catch_up((&one, HOME), (&other, FAR), &key);
    assert_eq!(other.key(&id(&key)).unwrap().state, KeyState::PendingImport, "no material came along");
    let said = refused(&other, 8);
    assert!(said.contains("is not the material that"), "{said}");
    assert_eq!(give(&other, &id(&key), 7, None).unwrap(), material);
    are_one(&one, &other, &key);

    // What one region does with its material is its own affair.
    one.delete_material(&id(&key)).unwrap();
    assert_eq!(one.key(&id(&key)).unwrap().state, KeyState::PendingImport);
    assert!(one.replicas_behind().unwrap().is_empty());
    other.encrypt(&id(&key), b"x", &volume("v")).unwrap();
    refused(&one, 8);
    give(&one, &id(&key), 7, None).unwrap();
    give(&other, &id(&key), 7, Some(far.clock.now().wall + DAY)).unwrap();
    assert_eq!(one.key(&id(&key)).unwrap().expires, None);
    far.clock.pass(2 * DAY);
    assert_eq!(other.key(&id(&key)).unwrap().state, KeyState::PendingImport);
    let pending = other.encrypt(&id(&key), b"x", &volume("v")).unwrap_err();
    assert!(matches!(pending, KmsError::PendingImport(_)), "{pending}");
    one.encrypt(&id(&key), b"x", &volume("v")).unwrap();
    give(&other, &id(&key), 7, None).unwrap();

    // A replica that comes later hears of it at once, and so does whoever becomes the primary key.
    let third = Region::new(THIRD);
    let third = third.open();
    assert_eq!(replicate((&one, HOME), (&third, THIRD), &key).state, KeyState::PendingImport);
    assert!(give(&third, &id(&key), 9, None).is_err());
    give(&third, &id(&key), 7, None).unwrap();
    are_one(&one, &third, &key);
    catch_up((&one, HOME), (&other, FAR), &key);
    catch_up((&one, HOME), (&third, THIRD), &key);
    one.begin_move(&id(&key), FAR).unwrap();
    bring((&one, HOME), (&other, FAR), &key, None).unwrap();
    assert!(other.key(&id(&key)).unwrap().multi_region.unwrap().is_primary);
    are_one(&other, &one, &key);
    refused(&one, 8);
    let rotated = other.rotate_on_demand(&id(&key)).unwrap_err();
    assert!(matches!(rotated, KmsError::Unsupported(_)), "{rotated}");
}

/// The primary key's KMS was put back from a copy, and has been given something else.
#[test]
fn another_first_import_is_no_news_for_whoever_knows_of_one() {
    let (home, far) = (Region::new(HOME), Region::new(FAR));
    let (one, other) = (home.open(), far.open());
    let key = one.create(&NewKey { multi_region: true, external: true, ..NewKey::default() }).unwrap();
    replicate((&one, HOME), (&other, FAR), &key);
    let one = rolled_back(&home, |one| {
        give(one, &id(&key), 7, None).unwrap();
        catch_up((one, HOME), (&other, FAR), &key);
        give(&other, &id(&key), 7, None).unwrap();
    });
    give(&one, &id(&key), 8, None).unwrap();
    let wanted = one.generation_for(key.id, FAR).unwrap();
    let has = other.synchronization_parameters(HOME, &id(&key), wanted, false).unwrap();
    let e = one.note_parameters(key.id, FAR, &has).unwrap_err();
    assert_eq!(e.type_name(), "ConflictException", "{e}");
    other.encrypt(&id(&key), b"x", &volume("v")).unwrap();
}
