//! A data key that several KMS keys wrap: any of them opens the volume, attached and not.

use crate::common::attach::{Host, Place, flush, open, read, write};
use crate::common::disk::pattern;
use crate::common::killed::{End, killed_before};
use crate::common::store::said;
use crate::common::successor::Successor;
use base64::Engine;
use base64::engine::general_purpose::STANDARD as BASE64;
use sealblk::kms::{EncryptionContext, KeyProvider};
use serde_json::{Value, json};
use std::fs;
use std::process::Stdio;

/// The volume `t` with data under the KMS keys `alias/a`, `alias/b` and, if there are so many, `alias/c`, all
/// of the embedded KMS; and `alias/other`, which wraps nothing.
struct Several {
    place: Place,
}

impl Several {
    fn new(keys: usize) -> Self {
        let place = Place::new(&["--unencrypted"]);
        for alias in ["alias/a", "alias/b", "alias/c", "alias/other"] {
            place.store.ok(&["key", "create", "--alias", alias]);
        }
        place.store.ok(&["volume", "delete", "t"]);
        let mut command = vec!["volume", "create", "--size", "8MiB", "--name", "t", "--key", "alias/a"];
        command.extend(["--also-key", "alias/b", "--also-key", "alias/c"].iter().take(2 * (keys - 1)));
        place.store.ok(&command);
        let several = Several { place };
        several.place.put(128, &data());
        several
    }

    fn arn(&self, alias: &str) -> String {
        self.place.kms().describe(alias).expect("it was made").key_id
    }

    fn json(&self, arguments: &[&str]) -> Value {
        let text = self.place.store.ok(&[arguments, &["--json"]].concat());
        serde_json::from_str(&text).expect("JSON")
    }

    /// The ARNs of the KMS keys that wrap the volume's first data key, as its record has them.
    fn slots(&self) -> Vec<String> {
        let metadata = self.place.metadata();
        metadata.keys()[0].slots().iter().map(|slot| slot.wrapped.key_id.clone()).collect()
    }

    fn arns(&self, aliases: &[&str]) -> Vec<String> {
        aliases.iter().map(|alias| self.arn(alias)).collect()
    }

    /// Attaches it, and looks whether its data is there.
    #[track_caller]
    fn attach(&self) -> Host {
        let host = self.place.attach(&[]);
        assert!(read(&mut open(&self.place.socket()).rings[0], 128, data().len()) == data());
        host
    }

    /// Which KMS keys have opened it.
    fn opened_by(&self) -> Value {
        self.json(&["volume", "show", "t"])["attachment"]["unwrapped_by"].clone()
    }

    /// Attaches it, and detaches it; the KMS key of this alias has opened it.
    #[track_caller]
    fn opens_by(&self, alias: &str) {
        let host = self.attach();
        assert_eq!(self.opened_by(), json!([{"provider": "embedded", "key_id": self.arn(alias)}]));
        host.end();
    }

    /// A command that is refused with this exit code and changes nothing.
    #[track_caller]
    fn refused(&self, code: i32, arguments: &[&str]) -> String {
        let before = fs::read(self.place.volume_json()).unwrap();
        let output = self.place.store.run(arguments);
        assert_eq!(output.status.code(), Some(code), "{arguments:?}: {}", said(&output));
        assert!(output.stdout.is_empty(), "{}", said(&output));
        assert!(fs::read(self.place.volume_json()).unwrap() == before);
        said(&output)
    }

    /// Edits the record as somebody would who can write the store, and accepts it as an operator
    /// would who does not look.
    fn edit(&self, edit: impl FnOnce(&mut Value)) {
        let mut record: Value = serde_json::from_slice(&fs::read(self.place.volume_json()).unwrap()).unwrap();
        edit(&mut record);
        fs::write(self.place.volume_json(), record.to_string()).unwrap();
        self.place.store.accept();
    }

    fn format(&self) -> u64 {
        let record: Value = serde_json::from_slice(&fs::read(self.place.volume_json()).unwrap()).unwrap();
        record["format"].as_u64().expect("a number")
    }
}

fn data() -> Vec<u8> {
    pattern(1, 1 << 16)
}

#[test]
fn the_next_kms_key_opens_the_volume_and_is_named() {
    let it = Several::new(3);
    assert_eq!(it.slots(), it.arns(&["alias/a", "alias/b", "alias/c"]));
    let before = it.place.events().len();
    it.opens_by("alias/a");
    assert_eq!(it.place.events().len(), before, "the first one is no news");

    it.place.store.ok(&["key", "disable", "alias/a"]);
    it.opens_by("alias/b");
    let events = it.place.events();
    let event = events.last().expect("there is one more");
    assert_eq!(events.len(), before + 1);
    let volume = format!("arn:aws:ec2:us-east-1:000000000000:volume/{}", it.place.id());
    assert_eq!(event["resources"], json!([volume, it.arn("alias/b")]));
    let cause = format!("embedded:{0}: {0} is disabled.", it.arn("alias/a"));
    let detail = &event["detail"];
    assert_eq!((&detail["event"], &detail["result"]), (&json!("unwrapKey"), &json!("by-another")));
    assert_eq!(detail["cause"], json!(cause));
    // The audit log tells who gave the data key, for what, and until when.
    let audit = it.place.store.ok(&["audit", "show", "--json"]);
    let last = |step: &str| {
        let mut records = audit.lines().map(|line| serde_json::from_str::<Value>(line).expect("JSON"));
        let last = records.rfind(|record| record["eventName"] == step).expect("it is on record");
        last["resources"].to_string()
    };
    for step in ["AttachVolume", "DetachVolume"] {
        assert!(last(step).contains(&it.arn("alias/b")), "{step}: {}", last(step));
    }

    it.place.store.ok(&["key", "schedule-deletion", "alias/b", "--days", "7"]);
    it.opens_by("alias/c");
}

#[test]
fn a_refusal_names_the_answer_of_each() {
    let it = Several::new(2);
    it.place.store.ok(&["key", "disable", "alias/a"]);
    it.place.store.ok(&["key", "schedule-deletion", "alias/b", "--days", "7"]);
    let (a, b) = (it.arn("alias/a"), it.arn("alias/b"));
    let before = it.place.events().len();
    let said = it.place.refuse(5, &[]);
    let last = said.lines().last().expect("an error");
    assert!(last.contains("none of the 2 KMS keys gives the data key: "), "{said}");
    assert!(last.contains(&format!("embedded:{a}: {a} is disabled; enable it with")), "{said}");
    assert!(last.contains(&format!("embedded:{b}: {b} is pending deletion; ")), "{said}");
    let events = it.place.events();
    assert_eq!(events.len(), before + 1);
    let cause = format!("embedded:{a}: {a} is disabled.; embedded:{b}: {b} is pending deletion.");
    let detail = &events[before]["detail"];
    assert_eq!((&detail["event"], &detail["cause"]), (&json!("reattachVolume"), &json!(cause)));
}

#[test]
fn the_settings_say_who_is_asked_first() {
    let it = Several::new(3);
    let c = it.arn("alias/c");
    it.place.store.configure(&format!("key-order = ['aws', '{c}', 'embedded']"));
    let listed = it.json(&["volume", "key", "list", "t"]);
    let order: Vec<&str> = listed["keys"][0]["slots"]
        .as_array()
        .unwrap()
        .iter()
        .map(|it| it["key_id"].as_str().unwrap())
        .collect();
    assert_eq!(order, it.arns(&["alias/c", "alias/a", "alias/b"]));
    let before = it.place.events().len();
    it.opens_by("alias/c");
    assert_eq!(it.place.events().len(), before, "who is asked first is no news");
    it.place.store.configure("key-order = ['somewhere']");
    let words = it.refused(2, &["volume", "key", "list", "t"]);
    assert!(words.contains("key-order: \"somewhere\""), "{words}");
}

#[test]
fn kms_keys_come_and_go_attached_and_not() {
    let it = Several::new(1);
    assert_eq!((it.slots(), it.format()), (it.arns(&["alias/a"]), 2));
    let add = |alias: &str| it.json(&["volume", "key", "add", "t", "--key", alias]);
    let remove = |alias: &str| it.json(&["volume", "key", "remove", "t", "--key", alias]);
    let change = |alias: &str| json!([{"key": 0, "provider": "embedded", "key_id": it.arn(alias)}]);
    assert_eq!(add("alias/b"), json!({"id": it.place.id(), "added": change("alias/b")}));
    assert_eq!((it.slots(), it.format()), (it.arns(&["alias/a", "alias/b"]), 3));
    assert_eq!(remove("alias/a"), json!({"id": it.place.id(), "removed": change("alias/a")}));
    assert_eq!((it.slots(), it.format()), (it.arns(&["alias/b"]), 2), "as it was before there were slots");

    let host = it.attach();
    let mut session = open(&it.place.socket());
    add("alias/c");
    add("alias/other");
    assert_eq!(it.slots(), it.arns(&["alias/b", "alias/c", "alias/other"]));
    remove("alias/b");
    assert_eq!(it.slots(), it.arns(&["alias/c", "alias/other"]));
    // What opened it is what opened it.
    assert_eq!(it.opened_by()[0]["key_id"], json!(it.arn("alias/b")));
    write(&mut session.rings[0], 1024, &data());
    flush(&mut session.rings[0]);
    drop(session);
    host.end();
    it.place.store.ok(&["key", "disable", "alias/b"]);
    it.place.store.ok(&["key", "disable", "alias/c"]);
    it.opens_by("alias/other");
    // By the alias, the id and the ARN of a key that is off.
    it.place.store.ok(&["volume", "key", "remove", "t", "--key", &it.arn("alias/c")]);
    assert_eq!(it.slots(), it.arns(&["alias/other"]));
    it.place.store.ok(&["store", "check"]);
}

#[test]
fn a_new_copy_is_made_out_of_whichever_there_is() {
    let it = Several::new(2);
    it.place.store.ok(&["key", "disable", "alias/a"]);
    it.place.store.ok(&["volume", "key", "add", "t", "--key", "alias/c"]);
    it.place.store.ok(&["key", "disable", "alias/b"]);
    it.opens_by("alias/c");
    // The only one that is left, and it is off, too.
    it.place.store.ok(&["key", "disable", "alias/c"]);
    let said = it.refused(5, &["volume", "key", "add", "t", "--key", "alias/other"]);
    assert!(said.contains("none of the 3 KMS keys gives the data key"), "{said}");
}

#[test]
fn the_last_one_that_can_be_used_stays() {
    let it = Several::new(2);
    let remove = |aliases: &[&'static str]| {
        let keys: Vec<&'static str> = aliases.iter().flat_map(|alias| ["--key", *alias]).collect();
        [&["volume", "key", "remove", "t"], &keys[..]].concat()
    };
    let said = it.refused(2, &remove(&["alias/a", "alias/b"]));
    assert!(said.contains("no KMS key would be left"), "{said}");
    it.place.store.ok(&["key", "disable", "alias/b"]);
    let b = it.arn("alias/b");
    for attached in [false, true] {
        let host = attached.then(|| it.attach());
        let said = it.refused(5, &remove(&["alias/a"]));
        assert!(said.contains(&format!("{b} is disabled")) && said.contains("would not come by"), "{said}");
        if let Some(host) = host {
            host.end();
        }
    }
    // A copy that unwraps to something else is none.
    it.place.store.ok(&["key", "enable", "alias/b"]);
    let metadata = it.place.metadata();
    let fresh = it.place.kms().generate_wrapped("alias/b", 64, &metadata.encryption_context()).unwrap();
    it.edit(|record| record["keys"][0]["slots"][1]["wrapped"] = json!(BASE64.encode(&fresh.blob)));
    let said = it.refused(7, &remove(&["alias/a"]));
    assert!(said.contains("unwraps to another key"), "{said}");
    it.place.store.ok(&remove(&["alias/b"]));
    let said = it.refused(2, &remove(&["alias/a"]));
    assert!(said.contains("no KMS key would be left"), "{said}");
}

#[test]
fn what_cannot_be_changed_is_refused_in_plain_words() {
    let it = Several::new(2);
    it.place.store.ok(&["volume", "create", "--size", "1MiB", "--name", "plain", "--unencrypted"]);
    it.place.store.ok(&["key", "disable", "alias/c"]);
    for (code, arguments, words) in [
        (2, &["add", "t", "--key", "alias/a"][..], "wraps all of its data keys already"),
        (3, &["add", "t", "--key", "alias/none"], "alias/none"),
        (5, &["add", "t", "--key", "alias/c"], "is disabled; enable it with \"sealblk key enable alias/c\""),
        (2, &["add", "plain", "--key", "alias/b"], "it is not encrypted"),
        (3, &["add", "none", "--key", "alias/b"], "none"),
        (2, &["add", "t"], "--key"),
        (2, &["remove", "t", "--key", "alias/other"], "its data keys are wrapped by embedded:"),
        (2, &["remove", "plain", "--key", "alias/b"], "it is not encrypted"),
    ] {
        let said = it.refused(code, &[&["volume", "key"], arguments].concat());
        assert!(said.contains(words), "{arguments:?}: {said}");
    }
    for arguments in [
        &["volume", "create", "--size", "1MiB", "--key", "alias/a", "--also-key", "alias/a"][..],
        &["volume", "create", "--size", "1MiB", "--also-key", "alias/none"],
        &["volume", "create", "--size", "1MiB", "--unencrypted", "--also-key", "alias/a"],
        &["volume", "create", "--size", "1MiB", "--also-key", "alias/a", "--no-also-keys"],
    ] {
        let volumes = it.place.catalog().list().unwrap().len();
        let output = it.place.store.run(arguments);
        assert!([2, 3].contains(&output.status.code().unwrap()), "{arguments:?}: {}", said(&output));
        assert_eq!(it.place.catalog().list().unwrap().len(), volumes, "{arguments:?}");
    }
}

/// Each slot in each bad state, one after the other; the other one opens the volume.
#[test]
fn a_slot_that_is_no_good_is_passed_over() {
    let it = Several::new(2);
    let good: Value = serde_json::from_slice(&fs::read(it.place.volume_json()).unwrap()).unwrap();
    let kms = it.place.kms();
    let context = it.place.metadata().encryption_context();
    let elsewhere = EncryptionContext::pair("aws:ebs:id", "vol-0123456789abcdef0");
    for (bad, other) in [("alias/a", "alias/b"), ("alias/b", "alias/a")] {
        let slot = usize::from(bad == "alias/b");
        let blob = BASE64.decode(good["keys"][0]["slots"][slot]["wrapped"].as_str().unwrap()).unwrap();
        let mut broken = blob.clone();
        *broken.last_mut().unwrap() ^= 1;
        let foreign = it.place.metadata().keys()[0].slots()[slot].wrapped.clone();
        let states = [
            ("another data key", kms.generate_wrapped(bad, 64, &context).unwrap().blob, "another data key"),
            ("a short one", kms.generate_wrapped(bad, 32, &context).unwrap().blob, "32 bytes"),
            ("a broken one", broken, "InvalidCiphertextException"),
            ("garbage", vec![7; 100], "InvalidCiphertextException"),
            (
                "another volume's",
                kms.rewrap(&foreign, &context, bad, &elsewhere).unwrap().blob,
                "InvalidCiphertextException",
            ),
        ];
        for (what, blob, words) in states {
            it.edit(|record| record["keys"][0]["slots"][slot]["wrapped"] = json!(BASE64.encode(&blob)));
            it.opens_by(other);
            let detour = it.place.events().pop().unwrap();
            if bad == "alias/a" {
                assert_eq!(detour["detail"]["event"], json!("unwrapKey"), "{what}");
                assert!(detour["detail"]["cause"].as_str().unwrap().contains(words), "{what}: {detour}");
            }
            it.edit(|record| *record = good.clone());
        }
        it.place.store.ok(&["key", "disable", bad]);
        it.opens_by(other);
        it.place.store.ok(&["key", "schedule-deletion", bad, "--days", "7"]);
        it.opens_by(other);
        it.place.store.ok(&["key", "cancel-deletion", bad]);
        it.place.store.ok(&["key", "enable", bad]);
        it.opens_by("alias/a");
    }
}

#[test]
fn a_rewrap_changes_one_slot() {
    let it = Several::new(2);
    let blobs = || -> Vec<Vec<u8>> {
        it.place.metadata().keys()[0].slots().iter().map(|slot| slot.wrapped.blob.clone()).collect()
    };
    let said = it.refused(2, &["volume", "rewrap", "t", "--key", "alias/c"]);
    assert!(said.contains("say with --from"), "{said}");
    let said = it.refused(2, &["volume", "rewrap", "t", "--from", "alias/a", "--key", "alias/b"]);
    assert!(said.contains("already"), "{said}");
    let before = blobs();
    let done = it.json(&["volume", "rewrap", "t", "--from", "alias/b", "--key", "alias/c"]);
    let [from, to] = ["alias/b", "alias/c"].map(|alias| format!("embedded:{}", it.arn(alias)));
    assert_eq!(done["rewrapped"], json!([{"key": 0, "from": from, "to": to}]));
    assert_eq!(it.slots(), it.arns(&["alias/a", "alias/c"]));
    assert_eq!(blobs()[0], before[0]);
    // Without a key all of them, each by the newest version of its own.
    let host = it.attach();
    let before = blobs();
    it.place.store.ok(&["volume", "rewrap", "t"]);
    assert_eq!(it.slots(), it.arns(&["alias/a", "alias/c"]));
    assert!(blobs().iter().zip(&before).all(|(now, before)| now != before));
    host.end();
    // A KMS key that cannot be used any more is replaced by way of the other.
    it.place.store.ok(&["key", "disable", "alias/a"]);
    let a = it.arn("alias/a");
    it.place.store.ok(&["volume", "rewrap", "t", "--from", &a, "--key", "alias/b"]);
    it.place.store.ok(&["key", "disable", "alias/c"]);
    it.opens_by("alias/b");
}

#[test]
fn a_new_data_key_has_the_kms_keys_of_the_old_one_unless_others_are_named() {
    let it = Several::new(2);
    let newest = || -> Vec<String> {
        let metadata = it.place.metadata();
        let top = &metadata.keys()[metadata.top().key.unwrap()];
        top.slots().iter().map(|slot| slot.wrapped.key_id.clone()).collect()
    };
    let both = it.arns(&["alias/a", "alias/b"]);
    it.place.store.ok(&["volume", "rekey", "t", "--follow"]);
    assert_eq!((newest(), it.place.metadata().keys().len()), (both.clone(), 1));
    // Attached, and the present data key comes by the other KMS key.
    let host = it.attach();
    it.place.store.configure(&format!("key-order = ['{}']", it.arn("alias/b")));
    it.place.store.ok(&["volume", "rekey", "t", "--follow"]);
    assert_eq!(newest(), it.arns(&["alias/b", "alias/a"]));
    it.place.store.ok(&["key", "disable", "--yes", "alias/a"]);
    it.place.store.ok(&["volume", "rekey", "t", "--key", "alias/c", "--also-key", "alias/b", "--follow"]);
    assert_eq!(newest(), it.arns(&["alias/c", "alias/b"]));
    host.end();
    it.opens_by("alias/b");
    let said = it.place.store.run(&["volume", "rekey", "t", "--key", "alias/b", "--also-key", "alias/a"]);
    assert_eq!(said.status.code(), Some(5));
    assert_eq!((newest(), it.place.metadata().keys().len()), (it.arns(&["alias/c", "alias/b"]), 1));
    it.place.store.ok(&["volume", "rekey", "t", "--no-also-keys", "--follow"]);
    assert_eq!(newest(), it.arns(&["alias/b"]));
    it.opens_by("alias/b");
}

#[test]
fn the_settings_wrap_every_new_data_key_besides() {
    let it = Several::new(1);
    it.place.store.configure("also-keys = ['alias/b', 'alias/c']\ndefault-key = 'alias/a'");
    let create = |name: &str, more: &[&str]| -> Vec<String> {
        it.place.store.ok(&[&["volume", "create", "--size", "1MiB", "--name", name], more].concat());
        let made = it.json(&["volume", "show", name]);
        let slots = made["keys"][0]["slots"].as_array().unwrap();
        slots.iter().map(|slot| slot["key_id"].as_str().unwrap().to_owned()).collect()
    };
    assert_eq!(create("usual", &[]), it.arns(&["alias/a", "alias/b", "alias/c"]));
    assert_eq!(create("one-of-them", &["--key", "alias/c"]), it.arns(&["alias/c", "alias/b"]));
    assert_eq!(create("named", &["--also-key", "alias/other"]), it.arns(&["alias/a", "alias/other"]));
    assert_eq!(create("alone", &["--no-also-keys"]), it.arns(&["alias/a"]));
    it.place.store.ok(&["key", "disable", "alias/c"]);
    let output = it.place.store.run(&["volume", "create", "--size", "1MiB", "--name", "down"]);
    assert_eq!(output.status.code(), Some(5));
    let words = said(&output);
    assert!(words.contains("is disabled") && words.contains("--no-also-keys"), "{words}");
    let shown = it.json(&["settings", "show"]);
    assert_eq!(shown["also_keys"], json!(["alias/b", "alias/c"]));
}

#[test]
fn who_takes_over_knows_which_kms_key_opened_it() {
    let it = Several::new(2);
    it.place.store.ok(&["key", "disable", "alias/a"]);
    let host = it.attach();
    let said: Value = serde_json::from_str(&it.place.store.ok(&["upgrade", "t", "--json"])).expect("JSON");
    let successor = Successor::of(&said);
    assert_eq!(it.opened_by(), json!([{"provider": "embedded", "key_id": it.arn("alias/b")}]));
    it.place.store.ok(&["volume", "key", "add", "t", "--key", "alias/c"]);
    it.place.store.ok(&["detach", "t"]);
    drop((host, successor));
    assert_eq!(it.slots(), it.arns(&["alias/a", "alias/b", "alias/c"]));
}

#[test]
fn switching_a_key_off_asks_for_no_consent_where_another_opens_the_volume() {
    let it = Several::new(2);
    let host = it.attach();
    let shown = it.json(&["key", "show", "alias/a"]);
    let id = it.place.id();
    let needed = json!({"volumes": [id], "attached": [id], "snapshots": [], "without_another_key": []});
    assert_eq!(shown["needed_by"], needed);
    let said = it.place.store.ok(&["key", "disable", "alias/a"]);
    assert!(
        said.contains(&format!("needed by {id}, which has another key that can be used (attached")),
        "{said}"
    );
    // Of the other one it is the last.
    let output = it.place.store.run(&["key", "disable", "alias/b"]);
    assert_eq!(output.status.code(), Some(4), "{}", crate::common::store::said(&output));
    it.place.store.ok(&["key", "disable", "--yes", "alias/b"]);
    host.end();
}

#[test]
fn show_and_list_tell_of_each_key_and_check_them_all() {
    let it = Several::new(2);
    let (a, b) = (it.arn("alias/a"), it.arn("alias/b"));
    let shown = it.json(&["volume", "show", "t", "--check-key"]);
    assert_eq!(shown["keys"][0]["key_id"], json!(a));
    let slots = shown["keys"][0]["slots"].as_array().unwrap();
    assert_eq!((&slots[0]["key_id"], &slots[1]["key_id"]), (&json!(a), &json!(b)));
    assert_eq!(slots[1]["check"]["usable"], json!(true));
    it.place.store.ok(&["key", "disable", "alias/a"]);
    let shown = it.json(&["volume", "show", "t", "--check-key"]);
    let key = &shown["keys"][0];
    assert_eq!((&key["check"]["usable"], &key["slots"][0]["check"]["usable"]), (&json!(true), &json!(false)));
    let text = it.place.store.ok(&["volume", "show", "t", "--check-key"]);
    assert!(text.contains(&format!("or by embedded: {b}")) && text.contains("disabled: "), "{text}");
    it.place.store.ok(&["volume", "key", "list", "t", "--check-key"]);
    it.place.store.ok(&["key", "disable", "alias/b"]);
    for command in
        [&["volume", "show", "t", "--check-key"][..], &["volume", "key", "list", "t", "--check-key"]]
    {
        let output = it.place.store.run(command);
        let words = said(&output);
        assert_eq!(output.status.code(), Some(5), "{words}");
        assert!(
            words.contains(&format!("{a} is disabled")) && words.contains(&format!("{b} is disabled")),
            "{words}"
        );
    }
}

#[test]
fn the_watch_tells_a_volume_that_is_lost_from_one_that_is_not() {
    let it = Several::new(2);
    it.place.store.ok(&["volume", "create", "--size", "1MiB", "--name", "lone", "--key", "alias/a"]);
    let lone = it.json(&["volume", "show", "lone"])["id"].clone();
    let both = it.json(&["volume", "show", "t"])["id"].clone();
    let watch = || -> Vec<Value> {
        let said = it.place.store.ok(&["watch", "--once", "--json"]);
        said.lines().map(|line| serde_json::from_str(line).expect("JSON")).collect()
    };
    let column = |name: &str| {
        let list = it.place.store.ok(&["volume", "list"]);
        list.lines().find(|line| line.contains(name)).expect("it is there").to_owned()
    };
    assert_eq!(watch(), [] as [Value; 0]);
    it.place.store.ok(&["key", "disable", "alias/b"]);
    let told = watch();
    assert_eq!((told.len(), &told[0]["without_another_key"]), (1, &json!([])));
    let event = it.place.events().pop().unwrap();
    assert_eq!(event["detail"]["result"], json!("degraded"));
    assert!(
        event["detail"]["cause"].as_str().unwrap().contains("has another key that can be used"),
        "{event}"
    );
    assert!(column(both.as_str().unwrap()).contains("usable, not by every key"), "{}", column("vol-"));
    it.place.store.ok(&["key", "disable", "alias/a"]);
    let told = watch();
    assert_eq!(told.len(), 1);
    assert_eq!(told[0]["without_another_key"].as_array().unwrap().len(), 2);
    assert_eq!(it.place.events().pop().unwrap()["detail"]["result"], json!("unusable"));
    it.place.store.ok(&["key", "enable", "alias/b"]);
    watch();
    it.place.store.ok(&["key", "enable", "alias/a"]);
    watch();
    it.place.store.ok(&["key", "disable", "alias/a"]);
    let told = watch();
    assert_eq!(told[0]["without_another_key"], json!([lone]));
    let event = it.place.events().pop().unwrap();
    let (result, cause) = (&event["detail"]["result"], event["detail"]["cause"].as_str().unwrap());
    assert!(result == "unusable" && cause.contains("1 of the 2 volumes"), "{event}");
    let metrics = it.place.store.ok(&["metrics"]);
    let value = |volume: &Value| {
        let start = format!("sealblk_volume_attachable{{volume=\"{}\"", volume.as_str().unwrap());
        let line =
            metrics.lines().find(|line| line.starts_with(&start)).unwrap_or_else(|| panic!("{metrics}"));
        line.chars().last().unwrap()
    };
    assert_eq!((value(&both), value(&lone)), ('1', '0'));
}

/// One that is killed at any moment leaves a volume that attaches, with the slot or without.
#[test]
fn a_killed_change_leaves_what_was_or_what_comes() {
    let it = Several::new(1);
    let sets = [it.arns(&["alias/a"]), it.arns(&["alias/a", "alias/b"])];
    for (change, undo) in [("add", "remove"), ("remove", "add")] {
        for step in 0.. {
            assert!(step < 200, "it never ends");
            let before = it.slots();
            let mut command = it.place.store.command();
            command.args(["volume", "key", change, "t", "--key", "alias/b"]);
            let end = killed_before(command.stdout(Stdio::null()).stderr(Stdio::null()), step);
            let now = it.slots();
            assert!(sets.contains(&now), "{change}, step {step}: {now:?}");
            assert_eq!(it.place.dek().len(), 64, "{change}, step {step}");
            if end == End::Exited(0) {
                assert!(step > 3, "{change}, step {step}");
                break;
            }
            assert_eq!(end, End::Killed, "{change}, step {step}");
            if now != before {
                it.place.store.ok(&["volume", "key", undo, "t", "--key", "alias/b"]);
            }
        }
    }
    it.opens_by("alias/a");
}
