//! Recordings as wrong programs would have made them: the checks must find each out.

use super::explore::{Scope, explore};
use super::script::{Script, traced};
use super::trace::Trace;
use super::{hydration, kms, settings, snapshots, volumes};
use crate::common::patience::limit;

/// Tries the trace, of which what comes before `from` is right; what is found wrong must be this.
#[track_caller]
fn is_found_out(trace: &Trace, from: usize, problem: &str) {
    // Ends with the first that is found.
    match explore(trace, &Scope { from, one_of: 1, by_chance: limit() }) {
        Ok(tried) => panic!("nothing was found wrong: {tried}"),
        Err(failure) => {
            let failure = format!("{failure:?}");
            assert!(failure.contains(problem), "it was found out otherwise than by \"{problem}\": {failure}");
        }
    }
}

/// The trace without the first operation at or after `from` that is like this.
#[track_caller]
fn without(trace: Trace, from: usize, like: impl Fn(&str) -> bool) -> (Trace, usize) {
    let place = trace.find(from, like);
    (trace.without(place), place)
}

fn syncs_temporary(line: &str, of: &str) -> bool {
    line.starts_with("sync ") && line.contains(&format!("/{of}.")) && line.ends_with(".tmp")
}

fn syncs_volume_folder(line: &str) -> bool {
    line.starts_with("sync root/volumes/vol-") && line.matches('/').count() == 2
}

#[test]
fn a_program_that_does_not_sync_volume_json_is_found_out() {
    let trace = traced(|script| volumes::first_attach(script, &[]));
    let start = trace.start;
    let (trace, place) = without(trace, start, |line| syncs_temporary(line, "volume.json"));
    is_found_out(&trace, place, "volume.json");
}

#[test]
fn a_program_that_does_not_sync_the_folder_of_a_new_volume_is_found_out() {
    let trace = traced(|script| volumes::create(script, &["--unencrypted"]));
    let renamed = trace.find(trace.start, |line| line.ends_with("creating.json to volume.json"));
    let (trace, _) = without(trace, renamed, syncs_volume_folder);
    is_found_out(&trace, renamed, "was made and is not there");
}

#[test]
fn a_program_that_publishes_a_volume_before_its_layer_is_durable_is_found_out() {
    for like in ["sync root/layers/", "sync root/layers"] {
        let trace = traced(|script| volumes::create(script, &["--unencrypted"]));
        let made = trace.find(trace.start, |line| line.starts_with("make File root/layers/"));
        let (trace, place) = without(trace, made, |line| match like.ends_with('/') {
            true => line.starts_with(like),
            false => line == like,
        });
        is_found_out(&trace, place, "a volume is listed that is not whole");
    }
}

#[test]
fn settings_that_leave_the_store_before_they_are_durable_are_found_out() {
    for like in ["sync config/sealblk.toml.", "sync config"] {
        let trace = traced(settings::moved);
        let (start, is_file) = (trace.start, like.ends_with('.'));
        let links = |line: &str| line.starts_with("link ") && line.contains("config/sealblk.toml");
        let from = if is_file { start } else { trace.find(start, links) };
        let (trace, place) = without(trace, from, |line| match is_file {
            true => line.starts_with(like),
            false => line == like,
        });
        is_found_out(&trace, place, "settings");
    }
}

#[test]
fn an_import_that_publishes_its_volume_before_the_data_is_durable_is_found_out() {
    let trace = traced(|script| volumes::imported(script, &[]));
    let written = trace.find(trace.start, |line| line.starts_with("write root/layers/"));
    let (trace, place) = without(trace, written, |line| line.starts_with("datasync root/layers/"));
    is_found_out(&trace, place, "holds zeros instead of one of the patterns");
}

#[test]
fn an_image_whose_name_goes_before_its_volume_is_durable_is_found_out() {
    let trace = traced(volumes::taken_in_place);
    let renamed =
        trace.find(trace.start, |line| line.starts_with("rename") && line.ends_with(" to volume.json"));
    let (trace, _) = without(trace, renamed, syncs_volume_folder);
    is_found_out(&trace, renamed, "the image was lost");
}

#[test]
fn an_image_whose_name_goes_before_its_layers_is_durable_is_found_out() {
    let trace = traced(volumes::taken_in_place);
    let linked = trace.find(trace.start, |line| line.starts_with("link"));
    let (trace, place) = without(trace, linked, |line| line == "sync root/layers");
    is_found_out(&trace, place, "a volume is listed that is not whole");
}

#[test]
fn a_program_that_writes_before_its_seal_is_durable_is_found_out() {
    let trace = traced(|script| volumes::first_attach(script, &[]));
    let sealed =
        trace.find(trace.start, |line| line.starts_with("rename") && line.ends_with(" to volume.json"));
    let (trace, place) = without(trace, sealed, syncs_volume_folder);
    is_found_out(&trace, place, "it has no seal any more");
}

#[test]
fn a_program_that_does_not_sync_what_the_guest_flushes_is_found_out() {
    let trace = traced(|script| volumes::first_attach(script, &[]));
    let written = trace.find(trace.start, |line| line.starts_with("write root/layers/"));
    let (trace, place) = without(trace, written, |line| line.starts_with("datasync root/layers/"));
    is_found_out(&trace, place, "holds zeros instead of one of the patterns");
}

#[test]
fn a_program_that_removes_a_layer_before_the_deletion_is_durable_is_found_out() {
    let trace = traced(volumes::delete);
    let renamed = trace.find(trace.start, |line| line.ends_with("volume.json to deleting.json"));
    let (trace, place) = without(trace, renamed, syncs_volume_folder);
    is_found_out(&trace, place, "a volume is listed that is not whole");
}

/// Within a layer: what a command tries behind its end, to see whether there can be holes,
/// gives nothing back.
fn makes_a_hole(line: &str) -> bool {
    let behind_end = format!(" {}+", volumes::SECTORS * 512);
    line.starts_with("zero ") && line.contains(".img") && !line.contains(&behind_end)
}

/// By whichever of its names.
fn syncs_a_layer(line: &str) -> bool {
    line.starts_with("datasync ") && line.contains(".img")
}

#[test]
fn a_merge_that_takes_data_away_before_it_is_durable_where_it_goes_is_found_out() {
    let trace = traced(snapshots::deleted_while_attached);
    let written = trace.find(trace.start, |line| line.starts_with("write ") && line.contains(".img"));
    let (trace, place) = without(trace, written, syncs_a_layer);
    is_found_out(&trace, place, "instead of one of the patterns");
}

#[test]
fn space_that_is_given_back_before_what_covers_it_is_durable_is_found_out() {
    let trace = traced(snapshots::deleted_while_attached);
    // What the first snapshot alone needed; what was merged; and then what the volume's top covers.
    let first = trace.find(trace.start, makes_a_hole);
    let second = trace.find(first + 1, makes_a_hole);
    let (trace, place) = without(trace, second, syncs_a_layer);
    is_found_out(&trace, place, "holds zeros instead of one of the patterns");
}

#[test]
fn a_program_that_does_not_sync_an_event_is_found_out() {
    let trace = traced(|script| volumes::create(script, &["--unencrypted"]));
    let start = trace.start;
    let (trace, place) = without(trace, start, |line| line == "datasync root/events.jsonl");
    is_found_out(&trace, place, "was lost");
}

#[test]
fn a_kms_that_answers_before_its_record_is_durable_is_found_out() {
    let trace = traced(kms::key_states);
    let start = trace.find(trace.start, |line| line.contains("may be Disabled"));
    let written = trace.find(start, |line| line.starts_with("write root/kms/log"));
    let (trace, place) = without(trace, written, |line| line == "datasync root/kms/log");
    is_found_out(&trace, place, "the KMS store was cut short");
}

#[test]
fn a_snapshot_whose_record_comes_before_the_commit_is_found_out() {
    let mut trace = traced(|script| snapshots::of_detached(script, &[]));
    let commit =
        trace.find(trace.start, |line| line.starts_with("rename") && line.ends_with(" to volume.json"));
    let first = trace.find(commit, |line| line.starts_with("make ") && line.contains(" root/snapshots"));
    let last = trace.find(first, |line| line == "sync root/snapshots");
    for (n, place) in (first..=last).enumerate() {
        trace = trace.moved(place, commit + n);
    }
    is_found_out(&trace, commit, "is a snapshot's, and a volume writes to it");
}

#[test]
fn a_freeze_whose_new_layer_is_not_durable_before_the_commit_is_found_out() {
    let trace = traced(|script| snapshots::of_detached(script, &[]));
    let made = trace.find(trace.start, |line| line.starts_with("make File root/layers/"));
    let (trace, place) = without(trace, made, |line| line == "sync root/layers");
    is_found_out(&trace, place, "a volume is listed that is not whole");
}

#[test]
fn a_freeze_that_does_not_sync_the_old_top_is_found_out() {
    let trace = traced(|script| snapshots::of_attached(script, &[]));
    let begun = trace.find(trace.start, |line| line.contains("a snapshot of"));
    let commit = trace.find(begun, |line| line.starts_with("rename") && line.ends_with(" to volume.json"));
    // There is one before the guest is paused, so that the one in the pause has little to do.
    let syncs = |line: &String| line.starts_with("datasync root/layers/");
    let places: Vec<usize> = (begun..commit).rev().filter(|&n| syncs(&trace.lines()[n])).collect();
    assert!(!places.is_empty());
    let trace = places.into_iter().fold(trace, Trace::without);
    is_found_out(&trace, begun, "instead of one of the patterns");
}

#[test]
fn a_program_that_removes_a_snapshots_layer_before_the_deletion_is_durable_is_found_out() {
    let trace = traced(snapshots::deleted);
    let renamed = trace.find(trace.start, |line| line.starts_with("rename") && line.ends_with(".deleting"));
    // The layer that the older snapshot alone names is the newer one's as well; the last deletion removes it.
    let last = trace.find(renamed + 1, |line| line.starts_with("rename") && line.ends_with(".deleting"));
    let (trace, place) = without(trace, last, |line| line == "sync root/snapshots");
    is_found_out(&trace, place, "is named and not there");
}

#[test]
fn a_volume_that_is_larger_before_its_layer_is_durably_so_is_found_out() {
    let trace = traced(|script| volumes::grown(script, &[]));
    let noted = trace.find(trace.start, |line| line.ends_with(" to pending.json"));
    let (trace, place) = without(trace, noted, |line| line.starts_with("sync root/layers/"));
    is_found_out(&trace, place, "a volume is listed that is not whole");
}

/// Where `volume.json` is replaced by one without the layers that have left: the last replacement
/// before the copy is over.
fn layers_leave(trace: &Trace) -> usize {
    let noted =
        trace.find(trace.start, |line| line.starts_with("rename") && line.ends_with(" to leaving.json"));
    trace.find(noted, |line| line.starts_with("rename") && line.ends_with(" to volume.json"))
}

#[test]
fn a_copy_that_is_not_synced_before_the_old_layers_leave_is_found_out() {
    for scenario in [hydration::rekeyed_detached as fn(&mut Script), hydration::flattened] {
        let trace = traced(scenario);
        let commit = layers_leave(&trace);
        let last = |line: &String| line.starts_with("datasync root/layers/");
        let place = trace.lines()[..commit].iter().rposition(last).expect("the copy is synced");
        assert!(place > trace.start);
        let (trace, place) = (trace.without(place), place);
        is_found_out(&trace, place, "instead of one of the patterns");
    }
}

#[test]
fn a_program_that_removes_old_layers_before_they_have_left_durably_is_found_out() {
    let trace = traced(hydration::rekeyed_detached);
    let commit = layers_leave(&trace);
    let (trace, place) = without(trace, commit, syncs_volume_folder);
    is_found_out(&trace, place, "a volume is listed that is not whole");
}

/// A hole in the top is right when nothing lies below any more, and no power cut brings that back.
#[test]
fn a_program_that_makes_holes_before_the_old_layers_have_left_durably_is_found_out() {
    let trace = traced(|script| hydration::rekeyed_attached(script, &[]));
    let commit = layers_leave(&trace);
    let zeroed = trace.find(commit, |line| line.contains("the guest zeros"));
    // The old layers stay, so that nothing but the hole is wrong.
    let removed = |line: &String| line.starts_with("remove root/layers/");
    let places: Vec<usize> = (commit..trace.entries.len()).filter(|&n| removed(&trace.lines()[n])).collect();
    let trace = places.into_iter().rev().fold(trace, Trace::without);
    let (trace, _) = without(trace, commit, syncs_volume_folder);
    is_found_out(&trace, zeroed, "its layers are not those that it had");
}

#[test]
fn a_copy_of_a_snapshot_that_is_not_synced_before_it_is_there_is_found_out() {
    let trace = traced(hydration::copied);
    let renamed = trace.find(trace.start, |line| line.starts_with("rename") && line.contains(".copying to "));
    let synced = |line: &String| line.starts_with("datasync root/layers/");
    let place = trace.lines()[..renamed].iter().rposition(synced).expect("the copy is synced");
    assert!(place > trace.start);
    is_found_out(&trace.without(place), place, "instead of one of the patterns");
}

#[test]
fn a_name_that_is_not_durable_when_it_is_promised_is_found_out() {
    let trace = traced(volumes::renamed_and_modified);
    let renamed =
        trace.find(trace.start, |line| line.starts_with("rename") && line.ends_with(" to volume.json"));
    let (trace, _) = without(trace, renamed, syncs_volume_folder);
    // By the ledger, which has heard of it.
    is_found_out(&trace, renamed, "a volume is listed that is not whole");
}

#[test]
fn settings_of_a_volume_whose_mark_is_not_durable_before_their_entry_are_found_out() {
    let trace = traced(volumes::renamed_and_modified);
    let made =
        trace.find(trace.start, |line| line.starts_with("make File config/") && line.ends_with(".attach"));
    let is_sync = |line: &str| line.starts_with("sync config/") && line.ends_with("/marks");
    let (trace, _) = without(trace, made, is_sync);
    is_found_out(&trace, made, "no /attach/iops");
}
