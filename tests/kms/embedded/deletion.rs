//! Keys whose waiting window ends, under clocks that do what clocks do.

use crate::embedded::hands::{DAY, Hands};
use crate::embedded::{Place, volume};
use crate::suite::Admin;
use sealblk::kms::{KeyProvider, KeyState, KmsError, WrappedKey};
use std::fs;

#[test]
fn a_key_dies_when_its_window_is_over_and_its_material_leaves_the_disk() {
    let (place, clock) = (Place::new(), Hands::new());
    let kms = place.open_at(clock.clone());
    let key = kms.create_key("dying words", Some("alias/dying")).unwrap();
    let other = kms.create_key("staying", None).unwrap();
    let (context, other_key) = (volume("vol-1"), other.arn.as_str());
    let wrapped = kms.generate_wrapped("alias/dying", 64, &context).unwrap();
    let kept = kms.generate_wrapped(other_key, 64, &context).unwrap();
    let deletion = kms.schedule_deletion(&key.arn, 7).unwrap().deletion;
    assert_eq!(deletion, Some(20_007 * DAY));
    let leftover = place.data().join("log.0000.tmp");
    fs::copy(place.log(), &leftover).unwrap();

    clock.jump(100 * DAY);
    assert_eq!(place.open_at(clock.clone()).key(&key.arn).unwrap().state, KeyState::PendingDeletion);
    clock.jump(-100 * DAY);
    clock.pass(7 * DAY - 1);
    assert_eq!(place.open_at(clock.clone()).key(&key.arn).unwrap().state, KeyState::PendingDeletion);
    clock.pass(1);
    let fresh = place.open_at(clock.clone());
    let gone = KmsError::NotFound(format!("Key '{}' does not exist", key.arn));
    assert_eq!(fresh.key(&key.arn), Err(gone.clone()));
    assert!(matches!(fresh.key("alias/dying"), Err(KmsError::NotFound(_))));
    assert_eq!(fresh.decrypt(&wrapped, &context).unwrap_err(), gone);
    assert_eq!(kms.key(&key.arn), Err(gone), "also for who had it open");
    let blob = WrappedKey { key_id: other.arn.clone(), blob: wrapped.blob };
    assert!(matches!(fresh.decrypt(&blob, &context), Err(KmsError::AccessDenied(_))));
    assert!(fresh.decrypt(&kept, &context).is_ok());
    let log = fs::read(place.log()).unwrap();
    let holds = |words: &[u8]| log.windows(words.len()).any(|w| w == words);
    assert!(!holds(b"dying words") && holds(b"staying") && !leftover.exists());
    assert!(fresh.create_key("", None).is_ok() && place.open().key(other_key).is_ok());
}

#[test]
fn after_a_reboot_a_key_dies_only_when_the_clock_has_said_so_for_a_day() {
    let (place, clock) = (Place::new(), Hands::new());
    let kms = place.open_at(clock.clone());
    let key = Admin::create_key(&kms);
    kms.schedule_deletion(&key, 7).unwrap();
    let open = || place.open_at(clock.clone());
    clock.reboot();
    clock.jump(3650 * DAY);
    assert!(open().key(&key).is_ok());
    clock.jump(-3650 * DAY);
    assert!(open().key(&key).is_ok(), "the wrong clock was forgotten");
    clock.pass(8 * DAY);
    assert!(open().key(&key).is_ok(), "first seen now");
    clock.pass(DAY - 1);
    assert!(open().key(&key).is_ok());
    clock.pass(1);
    assert!(matches!(open().key(&key), Err(KmsError::NotFound(_))));
}
