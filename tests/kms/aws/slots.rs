//! Data keys that KMS keys of several KMSs wrap: the embedded one, and one elsewhere, which is down, slow, or
//! refuses.

use crate::aws::faults::{Answer, Faults, nobody};
use crate::aws::site::Site;
use crate::common::attach::{Host, Place, open, read};
use crate::common::disk::pattern;
use crate::common::store::said;
use crate::suite::Admin;
use sealblk::kms::KeyProvider;
use serde_json::{Value, json};
use std::fs;

const GRANTS: &str = "grantee-principal = 'arn:aws:iam::000000000000:root'\nkms-patience = 1\n";

/// A site whose volume `t` has data and is under the key elsewhere, `aws:…`, and under `alias/here` of the
/// embedded KMS.
struct Both {
    site: Site,
    here: String,
}

impl Both {
    fn new(settings: &str) -> Self {
        let site = Site::new(settings);
        site.place.store.ok(&["key", "create", "--alias", "alias/here"]);
        site.place.store.ok(&["volume", "key", "add", "t", "--key", "alias/here"]);
        let here = site.place.kms().describe("alias/here").expect("it was made").key_id;
        let both = Both { site, here };
        both.place().put(128, &data());
        both
    }

    fn place(&self) -> &Place {
        &self.site.place
    }

    #[track_caller]
    fn attach(&self) -> Host {
        let host = self.place().attach(&[]);
        assert!(read(&mut open(&self.place().socket()).rings[0], 128, data().len()) == data());
        host
    }

    #[track_caller]
    fn opens_by(&self, provider: &str) {
        let host = self.attach();
        let shown: Value =
            serde_json::from_str(&self.place().store.ok(&["volume", "show", "t", "--json"])).expect("JSON");
        let by = &shown["attachment"]["unwrapped_by"];
        assert_eq!(
            (by[0]["provider"].as_str(), by.as_array().map(Vec::len)),
            (Some(provider), Some(1)),
            "{by}"
        );
        host.end();
    }

    fn slots(&self) -> Vec<String> {
        let metadata = self.place().metadata();
        metadata.keys()[0].slots().iter().map(|slot| slot.kms_key().to_string()).collect()
    }
}

fn data() -> Vec<u8> {
    pattern(1, 1 << 16)
}

fn notes(place: &Place) -> usize {
    fs::read_dir(place.store.config().join("grants")).map_or(0, |folder| folder.count())
}

#[test]
fn a_kms_that_is_down_stops_no_attach() {
    let both = Both::new("kms-patience = 3600");
    assert_eq!(both.slots(), [format!("aws:{}", both.site.key), format!("embedded:{}", both.here)]);
    both.opens_by("aws");
    // It is asked once, however patient the settings are.
    let silent = Faults::start([], Answer::Garbage);
    for url in [nobody(), silent.url.clone()] {
        both.site.move_to(&url);
        both.opens_by("embedded");
        let event = both.place().events().pop().expect("an event");
        let (detail, cause) = (&event["detail"], event["detail"]["cause"].as_str().unwrap());
        assert_eq!((&detail["event"], &event["resources"][1]), (&json!("unwrapKey"), &json!(both.here)));
        assert!(cause.contains(&format!("could not reach {url}")), "{cause}");
    }
    both.site.move_to(&both.site.kms.url);
    both.opens_by("aws");
    both.place().store.configure("key-order = ['embedded']");
    both.site.move_to(&nobody());
    let before = both.place().events().len();
    both.opens_by("embedded");
    assert_eq!(both.place().events().len(), before, "who is asked first is no news");
}

#[test]
fn none_that_answers_is_an_error_that_names_both() {
    let both = Both::new("kms-patience = 1");
    let url = nobody();
    both.site.move_to(&url);
    both.place().store.ok(&["key", "disable", "alias/here"]);
    let said = both.place().refuse(6, &[]);
    let last = said.lines().last().expect("an error");
    for words in
        [&format!("aws:{}: could not reach {url}", both.site.key), &format!("{} is disabled", both.here)]
    {
        assert!(last.contains(words.as_str()), "{words}: {said}");
    }
    // Both refuse: another exit code, since waiting does not help.
    both.site.move_to(&both.site.kms.url);
    both.site.kms.admin().disable(&both.site.key).unwrap();
    let said = both.place().refuse(5, &[]);
    assert!(said.contains("none of the 2 KMS keys"), "{said}");
    both.site.kms.admin().enable(&both.site.key).unwrap();
    both.opens_by("aws");
}

#[test]
fn each_kms_key_elsewhere_in_each_bad_state_is_passed_over() {
    let both = Both::new("");
    let admin = both.site.kms.admin();
    admin.disable(&both.site.key).unwrap();
    both.opens_by("embedded");
    admin.schedule_deletion(&both.site.key, 7).unwrap();
    both.opens_by("embedded");
    admin.cancel_deletion(&both.site.key).unwrap();
    admin.enable(&both.site.key).unwrap();
    both.opens_by("aws");
    // Not allowed by the settings, which is found out without asking.
    both.place().store.configure("kms-keys = ['embedded']");
    both.opens_by("embedded");
    // The embedded KMS's root key is gone, and so is what it wraps.
    both.place().store.configure("");
    let away = both.place().folder().join("away");
    let root_key = fs::read_dir(both.place().store.config()).unwrap().map(|entry| entry.unwrap().path());
    let root_key = root_key.into_iter().find(|path| path.extension().is_some_and(|it| it == "key")).unwrap();
    fs::rename(&root_key, &away).unwrap();
    both.opens_by("aws");
    both.place().store.configure("key-order = ['embedded']");
    both.opens_by("aws");
    fs::rename(&away, &root_key).unwrap();
    both.opens_by("embedded");
}

/// What is added while one KMS is down is made by way of the other; and where one KMS has both keys, it wraps
/// by itself.
#[test]
fn a_kms_key_is_added_by_way_of_whichever_kms_answers() {
    let both = Both::new("kms-patience = 1");
    let store = &both.place().store;
    let other = both.site.kms.create_key();
    let audit = || {
        let text = fs::read_to_string(both.site.kms.folders().0.join("audit.jsonl")).unwrap_or_default();
        ["\"ReEncrypt\"", "\"Encrypt\"", "\"Decrypt\""].map(|name| text.matches(name).count())
    };
    let before = audit();
    store.ok(&["volume", "key", "add", "t", "--key", &format!("aws:{other}")]);
    let after = audit();
    assert!(after[0] > before[0] && after[1] == before[1], "{before:?} {after:?}");
    assert_eq!(both.slots().len(), 3);
    store.ok(&["key", "create", "--alias", "alias/there"]);
    both.site.move_to(&nobody());
    store.ok(&["volume", "key", "add", "t", "--key", "alias/there"]);
    // Without its KMS a key cannot be added; it can be removed, by its ARN.
    let output = store.run(&["volume", "key", "add", "t", "--key", "aws:alias/none"]);
    assert_eq!(output.status.code(), Some(6), "{}", said(&output));
    store.ok(&["volume", "key", "remove", "t", "--key", &format!("aws:{other}")]);
    assert_eq!(both.slots().len(), 3);
    store.ok(&["key", "disable", "alias/here"]);
    both.opens_by("embedded");
}

#[test]
fn a_grant_is_made_on_the_key_that_opens_the_volume_alone() {
    let both = Both::new(GRANTS);
    let (elsewhere, here) = (both.site.kms.admin(), both.place().kms());
    let grants = || (Admin::grants(&elsewhere, &both.site.key).len(), Admin::grants(&here, &both.here).len());
    let host = both.attach();
    assert_eq!((grants(), notes(both.place())), ((1, 0), 1));
    both.place().store.ok(&["detach", "t"]);
    host.ends_well();
    assert_eq!((grants(), notes(both.place())), ((0, 0), 0));
    elsewhere.disable(&both.site.key).unwrap();
    let host = both.attach();
    assert_eq!((grants(), notes(both.place())), ((0, 1), 1));
    host.end();
    assert_eq!((grants(), notes(both.place())), ((0, 0), 0));
    // One that was made, and gave no data key after all, is retired before the guest comes.
    elsewhere.enable(&both.site.key).unwrap();
    let metadata = both.place().metadata();
    let mut record: Value = serde_json::from_slice(&fs::read(both.place().volume_json()).unwrap()).unwrap();
    let blob = elsewhere.generate_wrapped(&both.site.key, 64, &metadata.encryption_context()).unwrap().blob;
    use base64::Engine;
    let blob = base64::engine::general_purpose::STANDARD.encode(blob);
    record["keys"][0]["slots"][0]["wrapped"] = json!(blob);
    fs::write(both.place().volume_json(), record.to_string()).unwrap();
    both.place().store.accept();
    let host = both.attach();
    assert_eq!((grants(), notes(both.place())), ((0, 1), 1));
    host.end();
    // And those of an attach that fails.
    both.place().store.ok(&["key", "disable", "alias/here"]);
    both.place().refuse(7, &[]);
    assert_eq!((grants(), notes(both.place())), ((0, 0), 0));
}
