//! The grants of attaches: each has one of its own while it lasts, however it ends.

use crate::aws::faults::{Answer, Faults, nobody};
use crate::aws::site::Site;
use crate::common::attach::{Host, Place};
use crate::common::helpers::children;
use crate::common::kms_server::{KmsServer, Principal};
use crate::common::patience::wait_for;
use crate::common::process::ended;
use crate::common::store::Store;
use crate::suite::{Admin, SeenGrant};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use sealblk::kms::EncryptionContext;
use sealblk::kms::embedded::grant_records::GrantOperation;
use sealblk::kms::embedded::grants::NewGrant;
use serde_json::Value;
use std::fs;

const ROOT: &str = "grantee-principal = 'arn:aws:iam::000000000000:root'\nkms-patience = 1\n";

/// The grants on the volume's key.
fn grants(site: &Site) -> Vec<SeenGrant> {
    Admin::grants(&site.kms.admin(), &site.key)
}

fn notes(place: &Place) -> usize {
    fs::read_dir(place.store.config().join("grants")).map_or(0, |folder| folder.count())
}

/// The keeper of a host process's grants.
fn keeper(host: &Host) -> Pid {
    let all = children(host.pid());
    assert_eq!(all.len(), 1, "{all:?}");
    all[0]
}

#[track_caller]
fn assert_granted(site: &Site, grantee: &str) {
    let seen = grants(site);
    assert_eq!(seen.len(), 1);
    let (operations, context) = (vec!["Decrypt"], EncryptionContext::pair("aws:ebs:id", site.place.id()));
    let expected = SeenGrant {
        id: seen[0].id.clone(),
        grantee: grantee.to_owned(),
        retiring: Some(grantee.to_owned()),
        operations,
        subset: Some(context),
    };
    assert_eq!(seen, [expected]);
}

/// Not only at the detach, which may be months later.
#[test]
fn the_grant_on_a_key_that_a_volume_needs_no_more_is_retired_while_it_is_attached() {
    let place = Place::with_settings(ROOT, &[]);
    let old = place.key();
    place.store.ok(&["key", "create", "--alias", "alias/new"]);
    let host = place.attach(&[]);
    assert_eq!((Admin::grants(&place.kms(), &old).len(), notes(&place)), (1, 1));
    place.store.ok(&["volume", "rekey", "t", "--key", "alias/new", "--follow"]);
    assert_ne!(place.key(), old);
    wait_for("the grant is retired", || match (Admin::grants(&place.kms(), &old).len(), notes(&place)) {
        (0, 0) => Ok(()),
        (grants, notes) => Err(format!("{grants} grants, {notes} notes; {}", host.output())),
    });
    place.store.ok(&["detach", "t"]);
    host.ends_well();
}

#[test]
fn an_attach_has_a_grant_for_its_volume_until_the_detach() {
    let site = Site::new(ROOT);
    for _ in 0..2 {
        let host = site.place.attach(&[]);
        assert_granted(&site, &site.who.arn);
        assert_eq!(notes(&site.place), 1);
        site.place.store.ok(&["detach", "t"]);
        assert_eq!(
            (grants(&site), notes(&site.place)),
            (vec![], 0),
            "whoever is told of the detach finds none"
        );
        host.ends_well();
    }
    let host = site.place.attach(&[]);
    host.end();
    assert_eq!((grants(&site), notes(&site.place)), (vec![], 0));
}

#[test]
fn without_a_grantee_and_where_the_settings_forbid_it_no_grant_is_made() {
    for settings in ["", "attach-grants = false\ngrantee-principal = 'arn:aws:iam::000000000000:root'"] {
        let site = Site::new(settings);
        let host = site.place.attach(&[]);
        assert_eq!((grants(&site), notes(&site.place)), (vec![], 0), "{settings}");
        host.end();
    }
}

#[test]
fn the_embedded_kms_has_them_too_where_the_settings_say_for_whom() {
    let place = Place::with_settings(ROOT, &[]);
    let host = place.attach(&[]);
    assert_eq!(Admin::grants(&place.kms(), &place.key()).len(), 1);
    host.end();
    assert_eq!((Admin::grants(&place.kms(), &place.key()), notes(&place)), (vec![], 0));
    // Another account's principal is nobody here.
    place.store.configure("grantee-principal = 'arn:aws:iam::111122223333:root'");
    let host = place.attach(&[]);
    assert_eq!(Admin::grants(&place.kms(), &place.key()), []);
    host.end();
}

#[test]
fn a_principal_at_aws_is_none_of_the_embedded_kms_that_has_the_account_s_number() {
    let settings = |who: &str| {
        format!(
            "region = 'eu-west-1'\naccount = '111122223333'\ngrantee-principal = \
             'arn:aws:iam::111122223333:{who}'\n"
        )
    };
    let place = Place::with_settings(&settings("role/vm-host"), &[]);
    place.store.ok(&["kms", "principal", "create", "here"]);
    for (who, made) in [("role/vm-host", 0), ("root", 0), ("user/here", 1)] {
        place.store.configure(&settings(who));
        let host = place.attach(&[]);
        assert_eq!(notes(&place), made, "{who}");
        host.end();
        assert_eq!(notes(&place), 0, "{who}");
    }
}

#[test]
fn the_grant_of_a_killed_host_process_is_retired_at_once() {
    let site = Site::new(ROOT);
    let host = site.place.attach(&[]);
    let keeper = ended(keeper(&host));
    host.crash();
    keeper.wait();
    assert_eq!((grants(&site), notes(&site.place)), (vec![], 0));
}

/// Kills a host process and the keeper of its grant.
fn kill_both(host: Host) {
    let keeper = keeper(&host);
    kill(keeper, Signal::SIGKILL).expect("it runs");
    host.crash();
}

#[test]
fn what_a_killed_keeper_leaves_is_retired_by_gc() {
    let site = Site::new(ROOT);
    kill_both(site.place.attach(&[]));
    let stale = grants(&site)[0].id.clone();
    let json = |arguments: &[&str]| {
        let text = site.place.store.ok(&[&["gc", "--json"], arguments].concat());
        serde_json::from_str::<Value>(&text).expect("JSON")["grants"].clone()
    };
    let would = json(&["--dry-run"]);
    assert_eq!(
        (would[0]["result"].as_str(), would[0]["grant_id"].as_str()),
        (Some("would-retire"), Some(&*stale))
    );
    assert_eq!(would[0]["volume"].as_str(), Some(&*site.place.id()));
    assert_eq!(grants(&site).len(), 1, "a dry run does nothing");
    assert_eq!(json(&[])[0]["result"], "retired");
    assert_eq!((grants(&site), notes(&site.place)), (vec![], 0));
    assert_eq!(json(&[]).as_array().map(Vec::len), Some(0));
}

#[test]
fn what_a_killed_keeper_leaves_is_retired_by_the_next_attach() {
    let site = Site::new(ROOT);
    kill_both(site.place.attach(&[]));
    let stale = grants(&site)[0].id.clone();
    let host = site.place.attach(&[]);
    assert!(grants(&site).iter().any(|grant| grant.id != stale), "it has its own");
    // The keeper does one thing after the other: with the end of this one the old one is retired as well.
    host.end();
    assert_eq!((grants(&site), notes(&site.place)), (vec![], 0));
    // Also where no grants are made any more.
    kill_both(site.place.attach(&[]));
    site.place.store.configure("attach-grants = false");
    let host = site.place.attach(&[]);
    let swept = ended(keeper(&host));
    host.end();
    swept.wait();
    assert_eq!((grants(&site), notes(&site.place)), (vec![], 0));
}

#[test]
fn the_grant_of_a_running_attach_is_nothing_for_gc() {
    let site = Site::new(ROOT);
    let host = site.place.attach(&[]);
    let said = site.place.store.ok(&["gc", "--json"]);
    assert_eq!(
        serde_json::from_str::<Value>(&said).expect("JSON")["grants"].as_array().map(Vec::len),
        Some(0)
    );
    assert_granted(&site, &site.who.arn);
    host.end();
}

#[test]
fn a_detach_does_not_depend_on_the_kms_and_what_is_left_is_retired_later() {
    let site = Site::new(ROOT);
    let faults = Faults::start([], Answer::Pass(site.kms.url.clone()));
    site.move_to(&faults.url);
    let mut host = site.place.attach(&[]);
    faults.now(Answer::HangUp);
    host.signal(Signal::SIGTERM);
    assert!(host.wait().success(), "{}", host.output());
    assert!(
        host.output().contains("the grant of this attach is not retired: could not reach "),
        "{}",
        host.output()
    );
    assert_eq!((grants(&site).len(), notes(&site.place)), (1, 1));
    site.move_to(&nobody());
    let failed = site.place.store.run(&["gc"]);
    assert_eq!(failed.status.code(), Some(6), "{}", crate::common::store::said(&failed));
    assert_eq!(notes(&site.place), 1);
    site.move_to(&site.kms.url);
    site.place.store.ok(&["gc"]);
    assert_eq!((grants(&site), notes(&site.place)), (vec![], 0));
}

#[test]
fn a_grant_of_which_nobody_knows_whether_it_was_made_is_found_and_retired() {
    let site = Site::new(ROOT);
    // The answer is lost: the KMS has made the grant, the host does not know it.
    let lost = Faults::start([], Answer::HangUp);
    site.move_to(&lost.url);
    for _ in 0..2 {
        site.place.refuse(6, &[]);
        assert_eq!(notes(&site.place), 1, "one note, however often it is tried");
    }
    let note =
        fs::read_dir(site.place.store.config().join("grants")).unwrap().next().unwrap().unwrap().path();
    let note: Value = serde_json::from_slice(&fs::read(note).unwrap()).unwrap();
    let text = |name: &str| note[name].as_str().expect("a text").to_owned();
    let new = NewGrant {
        grantee: &site.who.arn,
        retiring: Some(&site.who.arn),
        operations: &[GrantOperation::Decrypt],
        constraint: sealblk::kms::embedded::grant_records::Constraint {
            equals: None,
            subset: Some([("aws:ebs:id".to_owned(), site.place.id())].into()),
        },
        name: Some(&format!("sealblk/{}/{}", text("volume"), text("id"))),
    };
    let kms = site.kms.admin();
    kms.create_grant(&kms.owner(), &site.key, &new, false).unwrap();
    assert_eq!(grants(&site).len(), 1);
    site.move_to(&site.kms.url);
    site.place.store.ok(&["gc"]);
    assert_eq!((grants(&site), notes(&site.place)), (vec![], 0));
}

#[test]
fn an_attach_that_fails_after_its_grant_was_made_leaves_none() {
    let site = Site::new(ROOT);
    let path = site.place.volume_json();
    let text = fs::read_to_string(&path).unwrap();
    let json: Value = serde_json::from_str(&text).unwrap();
    let blob = json["keys"][0]["wrapped"].as_str().expect("the wrapped key");
    // The last character but the padding belongs to the authentication tag.
    let other =
        if blob.contains("AAAA") { blob.replacen("AAAA", "AAAB", 1) } else { format!("AAAA{}", &blob[4..]) };
    fs::write(&path, text.replace(blob, &other)).unwrap();
    site.place.store.accept();
    let mut command = site.place.attach_command(&[]);
    command.env("RUST_LOG", "debug");
    let said = site.place.run(command, vec![]);
    assert_eq!(said.code, 5, "{}", said.err);
    // Whoever attaches next waits for nothing, so the keeper may be at it still; gc does
    // what it has not done.
    site.place.store.ok(&["gc"]);
    assert_eq!((grants(&site), notes(&site.place)), (vec![], 0));
}

/// A host that asks as a principal of its own, which may do what this grant says.
fn host_with(operations: &[GrantOperation], settings: &str) -> (KmsServer, Principal, String, Place) {
    let kms = KmsServer::start();
    let (who, admin) = (kms.principal("host-1"), kms.admin());
    let key = Admin::create_key(&admin);
    let new = NewGrant { grantee: &who.arn, operations, ..NewGrant::default() };
    admin.create_grant(&admin.owner(), &key, &new, false).unwrap();
    let store = Store::new();
    store.configure(&format!("grantee-principal = '{}'\n{settings}", who.arn));
    store.set_environment(who.environment(&kms.url));
    let place = Place::of(store, &["--key", &format!("aws:{key}")]);
    (kms, who, key, place)
}

#[test]
fn a_host_with_no_more_rights_than_it_needs_makes_its_grants_and_retires_them() {
    let rights = [
        GrantOperation::CreateGrant,
        GrantOperation::Decrypt,
        GrantOperation::GenerateDataKeyWithoutPlaintext,
    ];
    let (kms, who, key, place) = host_with(&rights, "");
    let host = place.attach(&[]);
    let seen = Admin::grants(&kms.admin(), &key);
    assert_eq!(seen.iter().filter(|grant| grant.grantee == who.arn && grant.subset.is_some()).count(), 1);
    host.end();
    assert_eq!(Admin::grants(&kms.admin(), &key).len(), 1, "the operator's own");
}

#[test]
fn a_host_that_may_not_make_grants_is_told_which_setting_does_without() {
    let rights = [GrantOperation::Decrypt, GrantOperation::GenerateDataKeyWithoutPlaintext];
    let (_kms, who, _, place) = host_with(&rights, "");
    let said = place.refuse(5, &[]);
    assert!(
        said.contains(&format!("User: {} is not authorized to perform: kms:CreateGrant", who.arn)),
        "{said}"
    );
    assert!(said.contains("set attach-grants = false in "), "{said}");
    let event = place.events().pop().expect("an event");
    assert!(event["detail"]["cause"].as_str().is_some_and(|cause| cause.starts_with("User: ")), "{event}");
    assert_eq!(notes(&place), 0);
    place.store.configure("attach-grants = false");
    place.attach(&[]).end();
}

/// What whoever can write the store plants where earlier versions kept their notes, in their
/// format and in this one's.
fn plant(place: &Place, provider: &str, key: &str, grantee: &str, grant: Option<&str>) {
    use sha2::Digest;
    let folder = place.store.root().join("grants");
    fs::create_dir_all(&folder).unwrap();
    let store = fs::canonicalize(place.store.root()).unwrap();
    let store = hex::encode(sha2::Sha256::digest(store.as_os_str().as_encoded_bytes()));
    for version in [1, 2] {
        let id = uuid::Uuid::new_v4();
        let mut note = serde_json::json!({
            "version": version, "id": id, "volume": place.id(), "provider": provider, "key_id": key,
            "grantee": grantee, "since": "2026-01-31T23:59:59Z", "grant": grant,
        });
        if version == 2 {
            note["store"] = store.clone().into();
        }
        let name = format!("{}.{id}.json", place.id());
        fs::write(folder.join(name), serde_json::to_vec(&note).unwrap()).unwrap();
    }
}

/// Everything that looks at notes of grants: the attach of the volume they are of, with
/// and without grants, and gc.
fn let_everything_look(place: &Place) {
    let settings = fs::read_to_string(place.store.settings()).unwrap();
    place.store.configure(&format!("attach-grants = false\n{settings}"));
    let host = place.attach(&[]);
    assert!(host.output().contains("notes of grants are not read there any more"), "{}", host.output());
    host.end();
    place.store.configure(&settings);
    place.attach(&[]).end();
    assert_eq!(planted(place), 2, "an attach leaves them where they are");
    let gc = |arguments: &[&str]| {
        let text = place.store.ok(&[&["gc", "--json"], arguments].concat());
        let said: Value = serde_json::from_str(&text).expect("JSON");
        let what: Vec<Value> =
            said["left_overs"].as_array().expect("a list").iter().map(|l| l["what"].clone()).collect();
        (what, said["grants"].clone())
    };
    assert_eq!(gc(&["--dry-run"]), (vec!["note".into(), "note".into()], serde_json::json!([])));
    assert_eq!(planted(place), 2, "a dry run removes nothing");
    assert_eq!(gc(&[]).1, serde_json::json!([]));
    assert_eq!(planted(place), 0);
}

fn planted(place: &Place) -> usize {
    fs::read_dir(place.store.root().join("grants")).unwrap().count()
}

#[test]
fn a_note_that_lies_in_the_store_makes_no_grant() {
    let site = Site::new(ROOT);
    let thief = site.kms.principal("thief");
    plant(&site.place, "aws", &site.key, &thief.arn, None);
    let_everything_look(&site.place);
    assert_eq!(grants(&site), []);
    // Nor at the KMS that lies in the store.
    let place = Place::with_settings(ROOT, &[]);
    place.kms().create_principal("thief", false).unwrap();
    let key = place.key();
    plant(&place, "embedded", &key, "arn:aws:iam::000000000000:user/thief", None);
    let_everything_look(&place);
    assert_eq!(Admin::grants(&place.kms(), &key), []);
}

#[test]
fn a_note_that_lies_in_the_store_retires_no_grant() {
    let site = Site::new(ROOT);
    let (kms, other) = (site.kms.admin(), site.kms.principal("other"));
    let new = NewGrant { grantee: &other.arn, operations: &[GrantOperation::Decrypt], ..NewGrant::default() };
    let made = kms.create_grant(&kms.owner(), &site.key, &new, false).unwrap();
    plant(&site.place, "aws", &site.key, &site.who.arn, Some(&made.id));
    let_everything_look(&site.place);
    assert_eq!(grants(&site).iter().map(|grant| &grant.id).collect::<Vec<_>>(), [&made.id]);
}

/// The notes that are acted on find a grant by its name, and by nothing that looks like it.
#[test]
fn a_grant_of_another_name_is_not_retired_in_place_of_one_that_was_not_made() {
    let site = Site::new(ROOT);
    let lost = Faults::start([], Answer::HangUp);
    site.move_to(&lost.url);
    site.place.refuse(6, &[]);
    site.move_to(&site.kms.url);
    let kms = site.kms.admin();
    let new = NewGrant {
        grantee: &site.who.arn,
        retiring: Some(&site.who.arn),
        operations: &[GrantOperation::Decrypt],
        name: Some("the-operators-own"),
        ..NewGrant::default()
    };
    kms.create_grant(&kms.owner(), &site.key, &new, false).unwrap();
    let said = site.place.store.run(&["gc"]);
    assert_eq!(said.status.code(), Some(4), "{}", crate::common::store::said(&said));
    assert!(crate::common::store::said(&said).contains("may know it in a few minutes"));
    assert_eq!((grants(&site).len(), notes(&site.place)), (1, 1), "neither made nor retired");
    // Once the KMS would know it by now, there is none.
    let path =
        fs::read_dir(site.place.store.config().join("grants")).unwrap().next().unwrap().unwrap().path();
    let mut note: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    note["since"] = "2026-01-31T23:59:59Z".into();
    fs::write(&path, serde_json::to_vec(&note).unwrap()).unwrap();
    site.place.store.ok(&["gc"]);
    assert_eq!((grants(&site).len(), notes(&site.place)), (1, 0));
}

/// A clone with a data key of its own has two, which one KMS key wraps: one grant is for both.
#[test]
fn a_clone_with_its_own_data_key_is_attached_by_one_grant() {
    let site = Site::new(ROOT);
    let store = &site.place.store;
    let golden = store.ok(&["snapshot", "create", "t"]).trim().to_owned();
    store.ok(&["volume", "create", "--snapshot", &golden, "--own-data-key", "--name", "c"]);
    let catalog = site.place.catalog();
    let volume = || catalog.load(catalog.resolve("c").expect("find it")).expect("read it");
    let made = volume();
    assert_eq!((made.keys().len(), made.layout().hydrate()), (2, None));
    assert!(
        made.keys()
            .iter()
            .all(|key| key.first().provider == "aws" && key.first().wrapped.key_id == site.place.key())
    );
    let host = store.attach("c", &[]);
    assert_eq!(grants(&site).len(), 1);
    assert!(volume().is_sealed());
    host.detach();
    assert_eq!(grants(&site), []);
    // And it is made under a KMS key that is named, too.
    store.ok(&[
        "volume",
        "create",
        "--snapshot",
        &golden,
        "--own-data-key",
        "--key",
        &format!("aws:{}", site.key),
    ]);
}
