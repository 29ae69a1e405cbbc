//! Tags and policies.

use crate::embedded::Place;
use crate::suite::Admin;
use sealblk::kms::KmsError;
use sealblk::kms::embedded::admin::NewKey;

fn pair(name: &str, value: &str) -> (String, String) {
    (name.to_owned(), value.to_owned())
}

#[test]
fn tags_have_awss_rules() {
    let place = Place::new();
    let kms = place.open();
    let key = kms.create(&NewKey { tags: &[pair("team", "a")], ..NewKey::default() }).unwrap().arn;
    kms.tag(&key, &[pair("team", "b"), pair("disk", "")]).unwrap();
    let tags = || place.open().tags(&key).unwrap().into_iter().collect::<Vec<_>>();
    assert_eq!(tags(), [pair("disk", ""), pair("team", "b")]);
    kms.untag(&key, &["disk".into(), "absent".into()]).unwrap();
    assert_eq!(tags(), [pair("team", "b")]);

    let refused = |tags: &[(String, String)]| kms.tag(&key, tags).unwrap_err().type_name();
    assert_eq!(refused(&[pair("aws:x", "")]), "TagException");
    assert_eq!(refused(&[pair("x", "1"), pair("x", "2")]), "TagException");
    assert_eq!(refused(&[pair("", "")]), "ValidationException");
    assert_eq!(refused(&[pair(&"x".repeat(129), "")]), "ValidationException");
    assert_eq!(refused(&[pair("x", &"x".repeat(257))]), "ValidationException");
    let many: Vec<_> = (0..50).map(|n| pair(&n.to_string(), "")).collect();
    assert_eq!(refused(&many), "LimitExceededException");
    kms.tag(&key, &many[1..]).unwrap();
    assert_eq!(tags().len(), 50);

    kms.schedule_deletion(&key, 7).unwrap();
    let pending = KmsError::PendingDeletion(format!("{key} is pending deletion."));
    assert_eq!(kms.tag(&key, &[pair("x", "")]), Err(pending.clone()));
    assert_eq!(kms.untag(&key, &["team".into()]), Err(pending));
    assert_eq!(tags().len(), 50);
}

#[test]
fn policies_are_kept_word_for_word() {
    let place = Place::new();
    let kms = place.open();
    let key = Admin::create_key(&kms);
    let first = kms.policy(&key, "default").unwrap();
    assert!(first.contains("arn:aws:iam::000000000000:root"), "{first}");
    let policy = r#"{ "Version":"2012-10-17", "Statement": {"Effect":"Deny","Principal":"*","Action":"*","Resource":"*"}}"#;
    kms.put_policy(&key, "default", policy).unwrap();
    assert_eq!(place.open().policy(&key, "default").unwrap(), policy);
    assert_eq!(
        kms.put_policy(&key, "default", "{}").unwrap_err().type_name(),
        "MalformedPolicyDocumentException"
    );
    assert!(matches!(kms.put_policy(&key, "other", policy), Err(KmsError::NotFound(_))));
    assert!(matches!(kms.policy(&key, "other"), Err(KmsError::NotFound(_))));
    let made = kms.create(&NewKey { policy: Some(policy), ..NewKey::default() }).unwrap();
    assert_eq!(kms.policy(&made.arn, "default").unwrap(), policy);
}
