//! Recordings as wrong programs would have made them: the checks must find each out.

use super::explore::explore;
use super::trace::Trace;
use super::volumes;

#[track_caller]
fn is_found_out(trace: &Trace, from: usize, problem: &str) {
    match explore(trace, from) {
        Ok(tried) => panic!("nothing was found wrong: {tried}"),
        Err(failure) => {
            let failure = format!("{failure:?}");
            assert!(failure.contains(problem), "it was found out otherwise than by \"{problem}\": {failure}");
        }
    }
}

#[test]
fn a_program_that_does_not_sync_volume_json_is_found_out() {
    let trace = volumes::first_attach(&[]);
    let renamed =
        trace.find(trace.start, |line| line.contains("rename") && line.ends_with(" to volume.json"));
    let temporary =
        |line: &str| line.starts_with("sync") && line.contains("volume.json.") && line.ends_with(".tmp");
    let synced = trace.find(trace.start, temporary);
    assert!(synced < renamed);
    is_found_out(&trace.without(synced), synced, "volume.json");
}

#[test]
fn a_program_that_does_not_sync_the_folder_of_a_new_volume_is_found_out() {
    let trace = volumes::create(&["--unencrypted"]);
    let renamed = trace.find(trace.start, |line| line.contains("creating.json to volume.json"));
    let synced = trace.find(renamed, |line| line.starts_with("sync root/volumes/vol-"));
    is_found_out(&trace.without(synced), renamed, "was made and is not there");
}
