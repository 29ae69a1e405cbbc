//! Keys that are rotated, by their period and on demand.

use crate::embedded::hands::{DAY, Hands};
use crate::embedded::{Place, volume};
use crate::suite::Admin;
use sealblk::kms::embedded::records::RotationType;
use sealblk::kms::embedded::rotation::{DEFAULT_PERIOD, ON_DEMAND_MAX};
use sealblk::kms::{Exception, KmsError};
use std::collections::BTreeSet;

#[test]
fn what_was_encrypted_before_a_rotation_stays_readable() {
    let place = Place::new();
    let kms = place.open();
    let key = Admin::create_key(&kms);
    let mut sealed = vec![kms.encrypt(&key, b"0", &volume("v")).unwrap()];
    for n in 1..=ON_DEMAND_MAX {
        assert_eq!(kms.rotate_on_demand(&key).unwrap(), key);
        sealed.push(kms.encrypt(&key, n.to_string().as_bytes(), &volume("v")).unwrap());
    }
    let limit = kms.rotate_on_demand(&key).unwrap_err();
    assert_eq!(limit.type_name(), Exception::LimitExceeded.name());
    let again = place.open();
    for (n, sealed) in sealed.iter().enumerate() {
        let opened = again.open_blob(None, &sealed.blob, &volume("v")).unwrap();
        assert_eq!(*opened.plaintext, n.to_string().into_bytes());
        assert_eq!((&opened.key, &opened.material), (&key, &sealed.material));
    }
    let materials: BTreeSet<_> = sealed.iter().map(|s| s.material.clone()).collect();
    assert_eq!(materials.len(), ON_DEMAND_MAX + 1);
    let versions = again.versions(&key).unwrap();
    assert_eq!(versions.iter().map(|v| v.material.clone()).collect::<BTreeSet<_>>(), materials);
    assert_eq!(versions[0].rotation, None);
    assert_eq!(versions.iter().filter(|v| v.rotation == Some(RotationType::OnDemand)).count(), ON_DEMAND_MAX);
    assert_eq!(versions.iter().filter(|v| v.current).count(), 1);
}

#[test]
fn a_key_is_rotated_when_its_period_is_over_and_only_while_it_is_enabled() {
    let (place, clock) = (Place::new(), Hands::new());
    let kms = place.open_at(clock.clone());
    let key = Admin::create_key(&kms);
    let material = || kms.encrypt(&key, b"x", &volume("v")).unwrap().material;
    let first = material();
    kms.enable_rotation(&key, 90).unwrap();
    clock.pass(90 * DAY - 1);
    assert_eq!(material(), first);
    clock.pass(1);
    let second = material();
    assert_ne!(second, first);
    assert_eq!(kms.versions(&key).unwrap().last().unwrap().rotation, Some(RotationType::Automatic));

    kms.disable(&key).unwrap();
    clock.pass(400 * DAY);
    assert_eq!(kms.versions(&key).unwrap().len(), 2);
    kms.enable(&key).unwrap();
    assert_ne!(material(), second);
    assert_eq!(kms.versions(&key).unwrap().len(), 3, "what was missed is one rotation");

    kms.disable_rotation(&key).unwrap();
    assert_eq!(kms.rotation_status(&key).unwrap().automatic, None);
    let third = material();
    clock.pass(4000 * DAY);
    assert_eq!(material(), third);
}

#[test]
fn rotation_has_awss_rules() {
    let (place, clock) = (Place::new(), Hands::new());
    let kms = place.open_at(clock.clone());
    let key = Admin::create_key(&kms);
    assert_eq!(kms.rotation_status(&key).unwrap().automatic, None);
    for days in [89, 2561] {
        assert!(matches!(kms.enable_rotation(&key, days), Err(KmsError::Validation(_))));
    }
    kms.enable_rotation(&key, DEFAULT_PERIOD).unwrap();
    let status = kms.rotation_status(&key).unwrap();
    assert_eq!((status.key, status.automatic), (key.clone(), Some((365, 20_365 * DAY))));

    kms.disable(&key).unwrap();
    let disabled = KmsError::Disabled(format!("{key} is disabled."));
    assert_eq!(kms.enable_rotation(&key, 90), Err(disabled.clone()));
    assert_eq!(kms.disable_rotation(&key), Err(disabled.clone()));
    assert_eq!(kms.rotate_on_demand(&key), Err(disabled));
    assert!(kms.rotation_status(&key).unwrap().automatic.is_some());

    kms.schedule_deletion(&key, 7).unwrap();
    let pending = KmsError::PendingDeletion(format!("{key} is pending deletion."));
    assert_eq!(kms.enable_rotation(&key, 90), Err(pending.clone()));
    assert_eq!(kms.disable_rotation(&key), Err(pending.clone()));
    assert_eq!(kms.rotate_on_demand(&key), Err(pending.clone()));
    assert_eq!(kms.update_description(&key, "x"), Err(pending));
    assert_eq!(kms.rotation_status(&key).unwrap().automatic, None);
}

#[test]
fn data_keys_and_random_bytes_come_in_the_lengths_that_were_asked_for() {
    let place = Place::new();
    let kms = place.open();
    let key = Admin::create_key(&kms);
    for len in [1, 32, 64, 1024] {
        let (sealed, plaintext) = kms.generate_data_key(&key, len, &volume("v")).unwrap();
        assert_eq!(plaintext.len(), len);
        let opened = kms.open_blob(Some(&key), &sealed.blob, &volume("v")).unwrap();
        assert_eq!(opened.plaintext, plaintext);
        assert_eq!(kms.generate_random(len).unwrap().len(), len);
    }
    assert_ne!(kms.generate_random(64).unwrap(), kms.generate_random(64).unwrap());
    for len in [0, 1025] {
        assert!(matches!(kms.generate_random(len), Err(KmsError::Validation(_))));
    }
    kms.update_description(&key, "new words").unwrap();
    assert_eq!(place.open().key(&key).unwrap().description, "new words");
}
