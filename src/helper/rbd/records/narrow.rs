//! What may be asked of a pool: what a store has there, and of a confined process less.
#![forbid(unsafe_code)]

use super::wire::{MAX_HOLDER, MAX_RECORD, Request, VOLUMES, is_folder, is_lock, is_name, of_volume};

/// What a client reaches that is confined: the records of one volume, and what leads to its layers.
pub(super) struct Narrow {
    pub(super) folder: String,
    pub(super) layers: Vec<String>,
}

/// # Errors
/// For what is not a name, and for what this client may not ask any more.
pub(super) fn check(request: &Request, narrow: Option<&Narrow>) -> std::result::Result<(), &'static str> {
    let is_record = |folder: &str, file: &str| is_folder(folder) && is_name(file);
    let is_meant = match request {
        Request::Read { folder, file } | Request::Remove { folder, file } => is_record(folder, file),
        Request::Create { folder, file, text } | Request::Replace { folder, file, text } => {
            is_record(folder, file) && (1..=MAX_RECORD).contains(&text.len())
        }
        Request::Rename { folder, file, to } => is_record(folder, file) && is_name(to),
        Request::Names { folder } | Request::MakeFolder { folder } => is_folder(folder) || folder == VOLUMES,
        Request::RemoveFolder { folder } | Request::Narrow { folder, .. } => of_volume(folder).is_some(),
        Request::Lock { name, holder } | Request::BreakLock { name, holder } => {
            is_lock(name) && holder.len() <= MAX_HOLDER
        }
        Request::Unlock { name } | Request::Holder { name } => is_lock(name),
        Request::RemoveImage { name } | Request::MakeImageLonger { name, .. } => is_name(name),
    };
    if !is_meant {
        return Err("it names nothing that a store in a pool has");
    }
    let Some(narrow) = narrow else { return Ok(()) };
    let is_near = match request {
        Request::Read { folder, file } => {
            *folder == narrow.folder || folder == "layers" && narrow.layers.contains(file)
        }
        Request::Names { folder }
        | Request::Create { folder, .. }
        | Request::Replace { folder, .. }
        | Request::Remove { folder, .. }
        | Request::Rename { folder, .. } => *folder == narrow.folder,
        // Its own locks are all that it can let go of.
        Request::Unlock { .. } | Request::Holder { .. } => true,
        _ => false,
    };
    is_near.then_some(()).ok_or("this process reaches the records of one volume alone")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(text: &str) -> Request {
        serde_json::from_str(text).unwrap()
    }

    #[test]
    fn what_a_store_does_not_have_is_not_asked_of_the_pool() {
        let is_meant = |text: &str| check(&request(text), None).is_ok();
        for text in [
            r#"{"read":{"folder":"ledger","file":"vol-1.json"}}"#,
            r#"{"names":{"folder":"volumes"}}"#,
            r#"{"lock":{"name":"volumes/vol-1","holder":"{}"}}"#,
            r#"{"remove-image":{"name":"sealblk-1"}}"#,
        ] {
            assert!(is_meant(text), "{text}");
        }
        for text in [
            r#"{"read":{"folder":"volumes","file":"vol-1"}}"#,
            r#"{"read":{"folder":"ledger","file":"../x"}}"#,
            r#"{"read":{"folder":"rbd_directory","file":"x"}}"#,
            r#"{"create":{"folder":"ledger","file":"x","text":""}}"#,
            r#"{"rename":{"folder":"ledger","file":"x","to":"a/b"}}"#,
            r#"{"remove-folder":{"folder":"ledger"}}"#,
            r#"{"lock":{"name":"../x","holder":"{}"}}"#,
            r#"{"remove-image":{"name":"a/b"}}"#,
        ] {
            assert!(!is_meant(text), "{text}");
        }
        let long = Request::Lock { name: "x".into(), holder: "x".repeat(MAX_HOLDER + 1) };
        assert!(check(&long, None).is_err());
    }

    #[test]
    fn a_confined_process_reaches_its_own_volume_alone() {
        let narrow = Narrow { folder: "volumes/vol-1".into(), layers: vec!["1.device".into()] };
        let may = |text: &str| check(&request(text), Some(&narrow)).is_ok();
        for text in [
            r#"{"read":{"folder":"volumes/vol-1","file":"volume.json"}}"#,
            r#"{"replace":{"folder":"volumes/vol-1","file":"volume.json","text":"x"}}"#,
            r#"{"read":{"folder":"layers","file":"1.device"}}"#,
            r#"{"unlock":{"name":"volumes/vol-1"}}"#,
        ] {
            assert!(may(text), "{text}");
        }
        for text in [
            r#"{"read":{"folder":"volumes/vol-2","file":"volume.json"}}"#,
            r#"{"read":{"folder":"layers","file":"2.device"}}"#,
            r#"{"names":{"folder":"layers"}}"#,
            r#"{"replace":{"folder":"layers","file":"1.device","text":"x"}}"#,
            r#"{"replace":{"folder":"ledger","file":"vol-1.json","text":"x"}}"#,
            r#"{"remove-folder":{"folder":"volumes/vol-1"}}"#,
            r#"{"make-folder":{"folder":"volumes/vol-1"}}"#,
            r#"{"lock":{"name":"volumes","holder":"{}"}}"#,
            r#"{"break-lock":{"name":"volumes/vol-1","holder":"{}"}}"#,
            r#"{"remove-image":{"name":"sealblk-1"}}"#,
            r#"{"make-image-longer":{"name":"sealblk-1","len":1}}"#,
            r#"{"narrow":{"folder":"volumes/vol-2","layers":[]}}"#,
        ] {
            assert!(!may(text), "{text}");
        }
    }
}
