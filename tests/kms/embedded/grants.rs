//! Principals who may do nothing but what grants let them do.

use crate::embedded::{Place, volume};
use crate::suite::Admin;
use sealblk::kms::embedded::Embedded;
use sealblk::kms::embedded::grant_records::{Constraint, GrantOperation};
use sealblk::kms::embedded::grants::{GrantRef, Granted, NewGrant};
use sealblk::kms::embedded::page::Piece;
use sealblk::kms::embedded::principals::Caller;
use sealblk::kms::{EncryptionContext, KmsError};
use std::collections::BTreeMap;

fn principal(kms: &Embedded, name: &str) -> Caller {
    let made = kms.create_principal(name, false).unwrap().0;
    Caller { arn: made.arn, admin: false, peer: None }
}

fn subset(pairs: &[(&str, &str)]) -> Constraint {
    let pairs = pairs.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect();
    Constraint { equals: None, subset: Some(pairs) }
}

fn grant(kms: &Embedded, key: &str, to: &Caller, operations: &[GrantOperation]) -> Granted {
    let new = NewGrant { grantee: &to.arn, operations, ..NewGrant::default() };
    kms.create_grant(&kms.owner(), key, &new, false).unwrap()
}

fn kind<T>(result: Result<T, KmsError>) -> &'static str {
    result.err().expect("an error").type_name()
}

#[test]
fn a_principal_may_do_what_a_grant_lets_it_do_and_nothing_after_it_was_revoked() {
    let place = Place::new();
    let kms = place.open();
    let (key, other, host) = (Admin::create_key(&kms), Admin::create_key(&kms), principal(&kms, "host"));
    let may = |operation, key: &str, context: &EncryptionContext| {
        place.open().check_allowed(&host, operation, key, context).map(drop)
    };
    let denied = may(GrantOperation::Decrypt, &key, &volume("v")).unwrap_err();
    assert!(denied.to_string().contains("arn:aws:iam::000000000000:user/host is not authorized"), "{denied}");
    let new = NewGrant {
        grantee: &host.arn,
        operations: &[GrantOperation::Decrypt, GrantOperation::DescribeKey],
        constraint: subset(&[("aws:ebs:id", "v")]),
        ..NewGrant::default()
    };
    let granted = kms.create_grant(&kms.owner(), &key, &new, false).unwrap();
    assert_eq!(may(GrantOperation::Decrypt, &key, &volume("v")), Ok(()));
    assert_eq!(may(GrantOperation::DescribeKey, &key, &EncryptionContext::default()), Ok(()));
    assert_eq!(kind(may(GrantOperation::Decrypt, &key, &volume("w"))), "AccessDeniedException");
    assert_eq!(kind(may(GrantOperation::Encrypt, &key, &volume("v"))), "AccessDeniedException");
    assert_eq!(kind(may(GrantOperation::Decrypt, &other, &volume("v"))), "AccessDeniedException");
    assert_eq!(kind(kms.check_admin(&host, "CreateKey", "*")), "AccessDeniedException");
    kms.check_tokens(std::slice::from_ref(&granted.token)).unwrap();
    assert_eq!(kind(kms.check_tokens(&["x".into()])), "InvalidGrantTokenException");
    assert_eq!(kind(Place::new().open().check_tokens(&[granted.token])), "NotFoundException");

    assert_eq!(kind(kms.revoke_grant(&key, &granted.id, true)), "DryRunOperationException");
    assert_eq!(may(GrantOperation::Decrypt, &key, &volume("v")), Ok(()));
    kms.revoke_grant(&key, &granted.id, false).unwrap();
    assert_eq!(kind(may(GrantOperation::Decrypt, &key, &volume("v"))), "AccessDeniedException");
    assert_eq!(kind(kms.revoke_grant(&key, &granted.id, false)), "NotFoundException");
}

#[test]
fn the_same_request_with_a_name_is_the_same_grant() {
    let place = Place::new();
    let kms = place.open();
    let (key, host) = (Admin::create_key(&kms), principal(&kms, "host"));
    let operations = [GrantOperation::Decrypt, GrantOperation::Encrypt];
    let new =
        NewGrant { grantee: &host.arn, operations: &operations, name: Some("n"), ..NewGrant::default() };
    let create = |new: &NewGrant<'_>| kms.create_grant(&kms.owner(), &key, new, false).unwrap();
    let first = create(&new);
    assert_eq!(create(&new), first);
    let turned = NewGrant { operations: &[GrantOperation::Encrypt, GrantOperation::Decrypt], ..new.clone() };
    assert_eq!(create(&turned), first);
    assert_ne!(create(&NewGrant { operations: &operations[..1], ..new.clone() }).id, first.id);
    let unnamed = NewGrant { name: None, ..new.clone() };
    assert_ne!(create(&unnamed).id, create(&unnamed).id);
    let dry = kms.create_grant(&kms.owner(), &key, &unnamed, true);
    assert_eq!(kind(dry), "DryRunOperationException");
    assert_eq!(kms.grants(&key, None, None, &Piece::default()).unwrap().items.len(), 4);
}

#[test]
fn who_may_grant_gives_away_no_more_than_it_has() {
    let place = Place::new();
    let kms = place.open();
    let (key, host, guest) = (Admin::create_key(&kms), principal(&kms, "host"), principal(&kms, "guest"));
    let new = NewGrant {
        grantee: &host.arn,
        operations: &[GrantOperation::Decrypt, GrantOperation::CreateGrant],
        constraint: subset(&[("a", "1")]),
        ..NewGrant::default()
    };
    kms.create_grant(&kms.owner(), &key, &new, false).unwrap();
    let give = |caller: &Caller, operation, constraint: Constraint| {
        let new =
            NewGrant { grantee: &guest.arn, operations: &[operation], constraint, ..NewGrant::default() };
        kms.create_grant(caller, &key, &new, false).map(drop)
    };
    assert_eq!(give(&host, GrantOperation::Decrypt, subset(&[("a", "1"), ("b", "2")])), Ok(()));
    let denied = "AccessDeniedException";
    assert_eq!(kind(give(&host, GrantOperation::Decrypt, Constraint::default())), denied);
    assert_eq!(kind(give(&host, GrantOperation::Decrypt, subset(&[("b", "2")]))), denied);
    assert_eq!(kind(give(&host, GrantOperation::Encrypt, subset(&[("a", "1")]))), denied);
    assert_eq!(kind(give(&guest, GrantOperation::Decrypt, subset(&[("a", "1")]))), denied);
}

#[test]
fn a_grant_is_retired_by_those_whom_it_names() {
    let place = Place::new();
    let kms = place.open();
    let (key, host, cleaner) = (Admin::create_key(&kms), principal(&kms, "host"), principal(&kms, "cleaner"));
    let new = NewGrant {
        grantee: &host.arn,
        retiring: Some(&cleaner.arn),
        operations: &[GrantOperation::Decrypt],
        ..NewGrant::default()
    };
    let granted = kms.create_grant(&kms.owner(), &key, &new, false).unwrap();
    let id = GrantRef::Id { key: &key, grant: &granted.id };
    assert_eq!(kind(kms.retire_grant(&host, id, false)), "AccessDeniedException");
    let retirable = |caller| kms.retirable_grants(caller, &cleaner.arn, &Piece::default());
    assert_eq!(retirable(&cleaner).unwrap().items.len(), 1);
    assert_eq!(kind(retirable(&host)), "AccessDeniedException");
    kms.schedule_deletion(&key, 7).unwrap();
    kms.retire_grant(&cleaner, GrantRef::Token(&granted.token), false).unwrap();
    assert_eq!(kind(kms.retire_grant(&cleaner, id, false)), "NotFoundException");
    assert_eq!(kind(kms.create_grant(&kms.owner(), &key, &new, false)), "KMSInvalidStateException");

    kms.cancel_deletion(&key).unwrap();
    assert_eq!(kind(kms.create_grant(&kms.owner(), &key, &new, false)), "DisabledException");
    kms.enable(&key).unwrap();
    let own = grant(&kms, &key, &host, &[GrantOperation::Decrypt, GrantOperation::RetireGrant]);
    kms.retire_grant(&host, GrantRef::Token(&own.token), false).unwrap();
}

#[test]
fn grants_are_checked_and_listed_in_pieces() {
    let place = Place::new();
    let kms = place.open();
    let (key, host) = (Admin::create_key(&kms), principal(&kms, "host"));
    let good = NewGrant { grantee: &host.arn, operations: &[GrantOperation::Decrypt], ..NewGrant::default() };
    let create = |new: NewGrant<'_>| kind(kms.create_grant(&kms.owner(), &key, &new, false));
    assert_eq!(create(NewGrant { operations: &[], ..good.clone() }), "ValidationException");
    assert_eq!(create(NewGrant { name: Some("a b"), ..good.clone() }), "ValidationException");
    let nobody = "arn:aws:iam::000000000000:user/nobody";
    assert_eq!(create(NewGrant { grantee: nobody, ..good.clone() }), "InvalidArnException");
    assert_eq!(create(NewGrant { retiring: Some(nobody), ..good.clone() }), "InvalidArnException");
    let pairs: BTreeMap<_, _> = (0..9).map(|n| (n.to_string(), String::new())).collect();
    let constraint = Constraint { equals: Some(pairs), subset: None };
    assert_eq!(create(NewGrant { constraint, ..good }), "ValidationException");

    let mut made: Vec<String> =
        (0..7).map(|_| grant(&kms, &key, &host, &[GrantOperation::Encrypt]).id).collect();
    made.sort();
    let mut piece = Piece { limit: Some(3), marker: None };
    let mut seen = Vec::new();
    loop {
        let page = kms.grants(&key, None, Some(&host.arn), &piece).unwrap();
        assert!(page.items.len() <= 3);
        seen.extend(page.items.into_iter().map(|grant| grant.id));
        let Some(next) = page.next else { break };
        piece.marker = Some(next);
    }
    assert_eq!(seen, made);
    assert_eq!(kms.grants(&key, Some(&made[2]), None, &Piece::default()).unwrap().items.len(), 1);
}

#[test]
fn a_principal_goes_with_its_grants_and_its_secret_is_not_on_the_disk() {
    let place = Place::new();
    let kms = place.open();
    let key = Admin::create_key(&kms);
    let (made, secret) = kms.create_principal("host", false).unwrap();
    assert_eq!((made.access_keys[0].len(), secret.len()), (20, 40));
    let known = |access_key: &str| place.open().principal_of(access_key).unwrap();
    let (caller, again) = known(&made.access_keys[0]).unwrap();
    assert_eq!((caller.arn.as_str(), *again == *secret), ("arn:aws:iam::000000000000:user/host", true));
    assert!(known("AKIAIOSFODNN7EXAMPLE").is_none());
    let log = std::fs::read(place.log()).unwrap();
    assert!(!log.windows(secret.len()).any(|window| window == secret.as_bytes()));
    assert_eq!(kind(kms.create_principal("host", false)), "AlreadyExistsException");
    assert_eq!(kind(kms.create_principal("a b", false)), "ValidationException");

    grant(&kms, &key, &caller, &[GrantOperation::Decrypt]);
    kms.delete_principal("host").unwrap();
    assert!(known(&made.access_keys[0]).is_none());
    kms.create_principal("host", false).unwrap();
    let decrypt = kms.check_allowed(&caller, GrantOperation::Decrypt, &key, &volume("v"));
    assert_eq!(kind(decrypt), "AccessDeniedException", "another principal of the same name");
    let (root, _) = kms.create_principal("root", false).unwrap();
    assert!(root.admin && root.arn == "arn:aws:iam::000000000000:root");
    assert_eq!(kms.principals().unwrap().len(), 2);
    assert_eq!(kind(kms.delete_principal("nobody")), "NotFoundException");
}

#[test]
fn one_access_key_takes_over_from_the_other() {
    let place = Place::new();
    let kms = place.open();
    let (made, first_secret) = kms.create_principal("host", false).unwrap();
    let first = &made.access_keys[0];
    let secret_of =
        |id: &str| place.open().principal_of(id).unwrap().map(|(caller, secret)| (caller.arn, secret));
    assert_eq!(kind(kms.delete_access_key("host", first)), "ValidationException", "it is the only one");
    let (second, second_secret) = kms.create_access_key("host").unwrap();
    assert_eq!(kind(kms.create_access_key("host")), "LimitExceededException");
    assert_eq!(kms.principals().unwrap()[0].access_keys, [first.clone(), second.clone()]);
    // Both are the same principal, each with its own secret.
    assert_eq!(secret_of(first), Some((made.arn.clone(), first_secret)));
    assert_eq!(secret_of(&second), Some((made.arn.clone(), second_secret.clone())));
    assert_eq!(kind(kms.delete_access_key("host", "AKIAIOSFODNN7EXAMPLE")), "NotFoundException");
    assert_eq!(kind(kms.delete_access_key("nobody", first)), "NotFoundException");
    kms.delete_access_key("host", first).unwrap();
    assert_eq!(secret_of(first), None);
    assert_eq!(secret_of(&second), Some((made.arn.clone(), second_secret)));
    // And again, the other way round: the newer of two can go as well.
    let (third, _) = kms.create_access_key("host").unwrap();
    kms.delete_access_key("host", &third).unwrap();
    assert_eq!(kms.principals().unwrap()[0].access_keys, [second]);
    assert_eq!(kind(kms.create_access_key("nobody")), "NotFoundException");
}
