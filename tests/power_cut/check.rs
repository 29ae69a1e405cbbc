//! Whether a store after a power cut is what it must be: the real program is asked, and
//! its files are looked at.

use super::expect::{Content, Expect, Presence, SECTOR, Volume};
use super::site::Site;
use crate::common::frontend::{Request, block};
use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

/// What settings that are moved say.
pub const REGION: &str = "eu-test-1";

/// How much is read from a guest's disk at a time.
const PIECE: usize = 64 << 10;

type Result<T = ()> = std::result::Result<T, String>;

/// Everything that must hold of the store at `site`, which is changed by it. With `gc_first` what is left
/// over is cleared away before anybody attaches a volume, who would do so too.
pub fn check(site: &Site, expect: &Expect, gc_first: bool) -> Result {
    settings(site, expect)?;
    site.move_in().map_err(|e| format!("bring the ledger's key to where the store is now: {e}"))?;
    let listed = volumes(site, expect)?;
    layers_are_right(&site.root())?;
    // What each record says is what a command has made of it, wherever the power went.
    site.ok(&["store", "check"])?;
    image(site, expect, &listed)?;
    audit(site)?;
    if gc_first && site.root().exists() {
        site.ok(&["gc"])?;
    }
    events(site, expect)?;
    keys(site, expect)?;
    snapshots(site, expect)?;
    for (id, content) in &listed {
        contents(site, expect, id, content.as_ref()).map_err(|e| format!("{id}: {e}"))?;
    }
    next_commands(site, expect, listed.keys().cloned().collect())
}

fn json(site: &Site, arguments: &[&str]) -> Result<Value> {
    let text = site.ok(&[arguments, &["--json"]].concat())?;
    serde_json::from_str(&text).map_err(|e| format!("{arguments:?} printed no JSON: {e}: {text}"))
}

fn text<'a>(value: &'a Value, field: &str) -> Result<&'a str> {
    value[field].as_str().ok_or_else(|| format!("no {field} in {value}"))
}

/// Settings that were being moved can be moved, and are there and whole; once that was promised, nothing is
/// left to do.
fn settings(site: &Site, expect: &Expect) -> Result {
    let Some(promised) = expect.settings_moved else { return Ok(()) };
    let moved = json(site, &["settings", "move"])?;
    if promised && moved["moved"] == true {
        return Err(format!("the settings were moved and are in the store: {moved}"));
    }
    let shown = json(site, &["settings", "show"])?;
    match shown["region"] == REGION {
        true => Ok(()),
        false => Err(format!("the settings are gone: {shown}")),
    }
}

/// The volumes that are listed, and what each must hold, if it is one that somebody was told of.
fn volumes(site: &Site, expect: &Expect) -> Result<BTreeMap<String, Option<Content>>> {
    let mut found = BTreeMap::new();
    for volume in json(site, &["volume", "list"])?.as_array().ok_or("no list of volumes")? {
        let id = text(volume, "id")?;
        if volume["state"] != "available" || !volume["problem"].is_null() {
            return Err(format!("a volume is listed that is not whole: {volume}"));
        }
        let (shown, told) = (json(site, &["volume", "show", id])?, expect.volumes.get(id));
        wrapped_rightly(&shown, told)?;
        shows_what_it_may(&shown, told)?;
        found.insert(id.to_owned(), expect.volumes.get(id).map(|v| v.content.clone()));
    }
    right_ones_are_there(
        "volume",
        &expect.volumes,
        &found.keys().cloned().collect(),
        usize::from(expect.being_made.is_some()),
    )?;
    Ok(found)
}

/// A KMS key wraps the data key that may.
fn wrapped_rightly(shown: &Value, told: Option<&Volume>) -> Result {
    let Some(told) = told.filter(|volume| !volume.wrapped_by.is_empty()) else { return Ok(()) };
    let by = text(&shown["keys"][0], "key_id")?;
    match told.wrapped_by.iter().any(|key| by.ends_with(key)) {
        true => Ok(()),
        false => Err(format!("the volume is wrapped by {by} and must be by one of {:?}", told.wrapped_by)),
    }
}

/// What was changed of a volume is as it was before or after.
fn shows_what_it_may(shown: &Value, told: Option<&Volume>) -> Result {
    for (place, may) in told.iter().flat_map(|volume| &volume.shows) {
        let found = shown.pointer(place).ok_or_else(|| format!("no {place} in {shown}"))?.to_string();
        if !may.contains(&found) {
            return Err(format!("the volume shows {found} at {place} and must show one of {may:?}"));
        }
    }
    Ok(())
}

/// Compares what is listed with what was told; `more` says how many more may be there, being made.
fn right_ones_are_there(
    noun: &str,
    told: &BTreeMap<String, Volume>,
    found: &BTreeSet<String>,
    more: usize,
) -> Result {
    for (id, what) in told {
        match (what.presence, found.contains(id)) {
            (Presence::Must, false) => return Err(format!("{noun} {id} was made and is not there")),
            (Presence::MustNot, true) => return Err(format!("{noun} {id} was deleted and is there")),
            _ => {}
        }
    }
    match found.iter().filter(|id| !told.contains_key(*id)).count() {
        count if count > more => Err(format!("a {noun} is there that nobody asked for: {found:?}")),
        _ => Ok(()),
    }
}

/// Whatever names a layer, the layer is there; and what a snapshot names is written by no volume.
fn layers_are_right(root: &Path) -> Result {
    let (of_volumes, of_snapshots) = (volume_records(root)?, snapshot_records(root)?);
    for layer in of_volumes.iter().chain(&of_snapshots).flatten() {
        let is_there = |ending| root.join("layers").join(format!("{layer}.{ending}")).exists();
        if !(is_there("img") || is_there("coming") && is_there("wanted")) {
            return Err(format!("layer {layer} is named and not there"));
        }
    }
    let is_frozen = |top: &&String| of_snapshots.iter().flatten().any(|layer| layer == *top);
    match of_volumes.iter().filter_map(|layers| layers.first()).find(is_frozen) {
        Some(top) => Err(format!("layer {top} is a snapshot's, and a volume writes to it")),
        None => Ok(()),
    }
}

/// The layers of each volume, the top one first.
fn volume_records(root: &Path) -> Result<Vec<Vec<String>>> {
    let records = files(&root.join("volumes"))?.into_iter().map(|folder| folder.join("volume.json"));
    records.filter(|path| path.exists()).map(|path| layers_in(&path)).collect()
}

/// The layers of each snapshot, the top one first.
fn snapshot_records(root: &Path) -> Result<Vec<Vec<String>>> {
    let records = files(&root.join("snapshots"))?.into_iter();
    records
        .filter(|path| path.extension().is_some_and(|e| e == "json"))
        .map(|path| layers_in(&path))
        .collect()
}

fn layers_in(path: &Path) -> Result<Vec<String>> {
    let bytes = std::fs::read(path).map_err(|e| format!("{}: {e}", path.display()))?;
    let record: Value = serde_json::from_slice(&bytes).map_err(|e| format!("{}: {e}", path.display()))?;
    let layers = record["layers"].as_array().ok_or_else(|| format!("{}: no layers", path.display()))?;
    layers.iter().map(|layer| text(layer, "id").map(str::to_owned)).collect()
}

/// What is in a folder, which need not be there.
fn files(folder: &Path) -> Result<Vec<std::path::PathBuf>> {
    match std::fs::read_dir(folder) {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(Vec::new()),
        Err(e) => Err(format!("{}: {e}", folder.display())),
        Ok(entries) => Ok(entries.map(|entry| entry.expect("list a folder").path()).collect()),
    }
}

/// The image that is becoming a volume is there, whole, by its name; or it is a volume, which is
/// looked at like the others.
fn image(site: &Site, expect: &Expect, listed: &BTreeMap<String, Option<Content>>) -> Result {
    let Some(content) = &expect.image else { return Ok(()) };
    match std::fs::read(site.image()) {
        Ok(bytes) => content.allows(&bytes).map_err(|e| format!("the image: {e}")),
        Err(_) if listed.values().any(Option::is_none) => Ok(()),
        Err(e) => Err(format!("the image was lost: {e}, and it is no volume")),
    }
}

/// The log can be read, and has what must be in it.
fn events(site: &Site, expect: &Expect) -> Result {
    let lines = site.ok(&["events", "--json"])?;
    let mut found = BTreeSet::new();
    for line in lines.lines() {
        let event: Value = serde_json::from_str(line).map_err(|e| format!("no event: {e}: {line}"))?;
        let detail = &event["detail"];
        let snapshot = detail["snapshot_id"].as_str();
        let of = snapshot.or_else(|| event["resources"][0].as_str()).unwrap_or_default();
        let id = of.rsplit('/').next().unwrap_or_default();
        found.insert((text(detail, "event")?.to_owned(), id.to_owned()));
    }
    match expect.events.iter().find(|event| !found.contains(event)) {
        Some(event) => Err(format!("the event {event:?} was lost; there are {found:?}")),
        None => Ok(()),
    }
}

/// The audit's log is whole, except for a record that was never answered.
fn audit(site: &Site) -> Result {
    if site.root().join("audit.jsonl").exists() {
        site.ok(&["audit", "verify"])?;
    }
    Ok(())
}

/// The KMS's store opens, and every key is in a state that it may be in.
fn keys(site: &Site, expect: &Expect) -> Result {
    if !site.root().join("kms/log").exists() && expect.keys.is_empty() {
        return Ok(());
    }
    let mut found = BTreeMap::new();
    for key in json(site, &["key", "list"])?["keys"].as_array().ok_or("no list of keys")? {
        found.insert(text(key, "key_id")?.to_owned(), text(key, "state")?.to_owned());
    }
    for (id, states) in &expect.keys {
        match found.get(id) {
            None => return Err(format!("key {id} was made and is not there")),
            Some(state) if !states.contains(state) => {
                return Err(format!("key {id} is {state} and must be one of {states:?}"));
            }
            Some(_) => {}
        }
    }
    let more = found.keys().filter(|id| !expect.keys.contains_key(*id)).count();
    match more > usize::from(expect.key_being_made) + usize::from(expect.default_key) {
        true => Err(format!("there are keys that nobody asked for: {found:?}")),
        false => Ok(()),
    }
}

/// Every snapshot is whole: a volume made of it holds what it must.
fn snapshots(site: &Site, expect: &Expect) -> Result {
    if expect.snapshots.is_empty() && expect.snapshots_being_made.is_empty() {
        return Ok(());
    }
    let list = json(site, &["snapshot", "list"])?;
    let mut found = BTreeSet::new();
    for snapshot in list.as_array().ok_or("no list of snapshots")? {
        let id = text(snapshot, "id")?;
        found.insert(id.to_owned());
        let told = expect.snapshots.get(id).map(|s| &s.content);
        let made = &expect.snapshots_being_made;
        let being_made = match made.len() {
            1 => made.values().next(),
            _ => made.get(text(snapshot, "volume_id")?),
        };
        let Some(content) = told.or(being_made) else { continue };
        let clone = site.ok(&["volume", "create", "--snapshot", id])?;
        let same = contents(site, expect, clone.trim(), Some(content));
        same.map_err(|e| format!("a volume made of {id}: {e}"))?;
        site.ok(&["volume", "delete", clone.trim()])?;
    }
    right_ones_are_there("snapshot", &expect.snapshots, &found, expect.snapshots_being_made.len())
}

/// A volume can be attached and holds what it must; without `told`, it is the one that is being made.
fn contents(site: &Site, expect: &Expect, id: &str, told: Option<&Content>) -> Result {
    if !expect.all_keys_are_enabled() {
        return Ok(());
    }
    let allowed = told.or(expect.being_made.as_ref()).ok_or("nobody asked for it")?;
    site.with_attached(id, |session| {
        let config = session.config().map_err(|e| format!("the configuration: {e}"))?;
        let (mut bytes, len) = (Vec::new(), config.capacity as usize * SECTOR);
        while bytes.len() < len {
            let piece = PIECE.min(len - bytes.len());
            let outcome = Request::read((bytes.len() / SECTOR) as u64, piece).run(&mut session.rings[0]);
            let outcome = outcome.map_err(|e| format!("read: {e}"))?;
            if outcome.status != block::OK {
                return Err(format!("a read at byte {} answers {}", bytes.len(), outcome.status));
            }
            bytes.extend(outcome.data);
        }
        allowed.allows(&bytes)
    })
}

/// The next commands work, change nothing that is there, and leave nothing behind of what was cut off.
fn next_commands(site: &Site, expect: &Expect, before: BTreeSet<String>) -> Result {
    if expect.key_being_made || !expect.keys.is_empty() {
        let key = json(site, &["key", "create"])?;
        let mut after = expect.clone();
        after.key_is(text(&key, "key_id")?, "Enabled");
        keys(site, &after)?;
    }
    let probe = site.ok(&["volume", "create", "--size", "4KiB", "--unencrypted"])?;
    site.ok(&["volume", "delete", probe.trim()])?;
    let list = json(site, &["volume", "list"])?;
    let ids = list.as_array().ok_or("no list of volumes")?.iter().map(|v| text(v, "id").map(str::to_owned));
    let after = ids.collect::<Result<BTreeSet<String>>>()?;
    if after != before {
        return Err(format!(
            "the volumes were {before:?} and are {after:?} after the next create and delete"
        ));
    }
    site.ok(&["gc"])?;
    audit(site)?;
    nothing_is_left(&site.root())
}

fn nothing_is_left(root: &Path) -> Result {
    let named: Vec<String> = [volume_records(root)?, snapshot_records(root)?].concat().concat();
    let is_named =
        |path: &Path| path.file_stem().is_some_and(|id| named.iter().any(|layer| id == layer.as_str()));
    if let Some(layer) = files(&root.join("layers"))?.iter().find(|path| !is_named(path)) {
        return Err(format!("{} is left, and nothing names it", layer.display()));
    }
    let left = |path: &std::path::PathBuf| {
        ["pending.json", "leaving.json"].iter().any(|name| path.ends_with(name))
            || path.extension().is_some_and(|e| e == "tmp" || e == "copying")
    };
    let folders = files(&root.join("volumes"))?;
    for folder in folders.iter().chain([&root.join("snapshots")]) {
        if let Some(path) = files(folder)?.into_iter().find(left) {
            return Err(format!("{} is left", path.display()));
        }
    }
    match folders.iter().find(|folder| !folder.join("volume.json").exists()) {
        Some(folder) => {
            Err(format!("{} is left, which is no volume: {:?}", folder.display(), files(folder)?))
        }
        None => Ok(()),
    }
}
