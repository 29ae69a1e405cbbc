//! What is written in the file that is applied, into what is meant.
#![forbid(unsafe_code)]

use crate::base::{Error, Kind, Result, size};
use crate::catalog::attach_settings::AttachSettings;
use crate::catalog::metadata::VolumeName;
use crate::catalog::tags::Tags;
use crate::crypt::SectorSize;
use serde::de::{self, Visitor};
use serde::{Deserialize, Deserializer};
use std::collections::HashSet;
use std::fmt;
use std::time::Duration;

/// A volume as it shall be.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Wanted {
    /// Which one it is.
    pub name: VolumeName,
    /// In bytes.
    #[serde(default, deserialize_with = "bytes")]
    pub size: Option<u64>,
    /// The KMS key, by id, ARN or alias.
    pub key: Option<String>,
    /// The KMS keys that wrap its data key besides; without, the settings say when it is made.
    pub also_keys: Option<Vec<String>>,
    /// Its sector size.
    pub sector_size: Option<SectorSize>,
    /// The snapshot that it is made from: its id or its tag Name.
    pub snapshot: Option<String>,
    /// Whether it is not encrypted.
    #[serde(default)]
    pub unencrypted: bool,
    /// Whether, made from a snapshot, it has a data key of its own; without, the settings say when it is
    /// made.
    #[serde(default)]
    pub own_data_key: bool,
    /// Exactly its tags; without, whatever there are.
    pub tags: Option<Tags>,
    /// Requests a second that an attach lets in, 0 for any number; without, whatever is kept.
    pub iops: Option<u64>,
    /// Bytes a second, likewise.
    #[serde(default, deserialize_with = "bytes")]
    pub throughput: Option<u64>,
    /// For how many milliseconds' worth of these an idle volume saves up; in the file, seconds.
    #[serde(default, rename = "burst", deserialize_with = "milliseconds")]
    pub burst_ms: Option<u64>,
    /// The disk's serial as the guest sees it; without, whatever is kept.
    pub serial: Option<String>,
    /// How many queues the guest may use; without, whatever is kept.
    pub queues: Option<u16>,
}

impl Wanted {
    /// What is kept with the volume for its attaches, where `kept` is now.
    pub fn attach_settings(&self, kept: &AttachSettings) -> AttachSettings {
        AttachSettings {
            iops: self.iops.or(kept.iops),
            throughput: self.throughput.or(kept.throughput),
            burst_ms: self.burst_ms.or(kept.burst_ms),
            serial: self.serial.clone().or_else(|| kept.serial.clone()),
            queues: self.queues.or(kept.queues),
        }
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Written {
    #[serde(default)]
    volume: Vec<Wanted>,
}

/// Reads a file: JSON if it begins with a brace, which TOML never does.
///
/// # Errors
/// `Usage`, with the place in the file.
pub fn parse(text: &str) -> Result<Vec<Wanted>> {
    let written: Result<Written, String> = match text.trim_start().starts_with('{') {
        true => serde_json::from_str(text).map_err(|e| e.to_string()),
        false => toml::from_str(text).map_err(|e| e.to_string().trim_end().to_string()),
    };
    let usage = |message: String| Error::new(Kind::Usage, message);
    let volumes = written.map_err(usage)?.volume;
    let mut names = HashSet::new();
    for volume in &volumes {
        let problem = if !names.insert(volume.name.as_str()) {
            "is there twice"
        } else if volume.size.is_none() && volume.snapshot.is_none() {
            "has neither a size nor a snapshot"
        } else if volume.own_data_key && (volume.snapshot.is_none() || volume.unencrypted) {
            "has own-data-key, which is of encrypted volumes that are made from a snapshot"
        } else if volume.unencrypted && (volume.key.is_some() || volume.also_keys.is_some()) {
            "has a key, and is not to be encrypted"
        } else if let Err(problem) = volume.attach_settings(&AttachSettings::default()).check() {
            return Err(usage(format!("the volume \"{}\": {problem}", volume.name)));
        } else {
            continue;
        };
        return Err(usage(format!("the volume \"{}\" {problem}", volume.name)));
    }
    Ok(volumes)
}

/// A number of bytes, or a text such as `20GiB`.
fn bytes<'de, D: Deserializer<'de>>(from: D) -> Result<Option<u64>, D::Error> {
    struct Bytes;
    impl Visitor<'_> for Bytes {
        type Value = u64;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("a size, such as \"20GiB\" or a number of bytes")
        }

        fn visit_str<E: de::Error>(self, text: &str) -> Result<u64, E> {
            size::parse(text).map_err(E::custom)
        }

        fn visit_u64<E: de::Error>(self, bytes: u64) -> Result<u64, E> {
            Ok(bytes)
        }

        fn visit_i64<E: de::Error>(self, bytes: i64) -> Result<u64, E> {
            u64::try_from(bytes).map_err(|_| E::custom("a size is not below zero"))
        }
    }
    from.deserialize_any(Bytes).map(Some)
}

/// A number of seconds.
fn milliseconds<'de, D: Deserializer<'de>>(from: D) -> Result<Option<u64>, D::Error> {
    let seconds = f64::deserialize(from)?;
    let duration = Duration::try_from_secs_f64(seconds).map_err(de::Error::custom)?;
    u64::try_from(duration.as_millis()).map(Some).map_err(de::Error::custom)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_languages_say_the_same() {
        let toml = "[[volume]]\nname = \"db\"\nsize = \"20GiB\"\nkey = \"alias/prod\"\nsector-size = 4096\n\
                    tags = { env = \"prod\" }\n\n[[volume]]\nname = \"b\"\nsnapshot = \"nightly\"\n";
        let json = r#" {"volume": [{"name": "db", "size": 21474836480, "key": "alias/prod", "sector-size": 4096,
                     "tags": {"env": "prod"}}, {"name": "b", "snapshot": "nightly"}]}"#;
        let parsed = parse(toml).unwrap();
        assert_eq!(parsed, parse(json).unwrap());
        assert_eq!((parsed[0].size, parsed[1].size), (Some(20 << 30), None));
        assert_eq!(parse("").unwrap(), []);
        let kept = parse(
            "[[volume]]\nname = \"a\"\nsize = 1\niops = 0\nthroughput = \"1MiB\"\nburst = 2\nserial = \"s\"\n\
             queues = 3\n[[volume]]\nname = \"b\"\nsize = 1\nburst = 0.25\n",
        )
        .unwrap();
        let expected = AttachSettings {
            iops: Some(0),
            throughput: Some(1 << 20),
            burst_ms: Some(2000),
            serial: Some("s".into()),
            queues: Some(3),
        };
        assert_eq!(kept[0].attach_settings(&AttachSettings::default()), expected);
        // What is not said stays.
        let expected = AttachSettings { burst_ms: Some(250), ..expected };
        assert_eq!(kept[1].attach_settings(&kept[0].attach_settings(&AttachSettings::default())), expected);
    }

    #[test]
    fn what_makes_no_sense_is_refused_with_its_place() {
        for (text, words) in [
            ("[[volume]]\nname = \"a\"\nsize = 1\ncolour = 3\n", "line 4"),
            ("[[volume]]\nname = \"a\"\nsize = \"big\"\n", "line 3"),
            ("[[volume]]\nname = \"a\"\nsize = -1\n", "below zero"),
            ("[[volume]]\nname = \"a\"\nsize = true\n", "such as"),
            ("[[volume]]\nname = \"vol-1\"\nsize = 1\n", "begins like an id"),
            ("[[volume]]\nname = \"a\"\nsize = 1\nsector-size = 1024\n", "512 or 4096"),
            ("[[volume]]\nname = \"a\"\nsize = 1\ntags = { \"aws:x\" = \"1\" }\n", "reserved"),
            ("[[volumes]]\n", "volumes"),
            ("[[volume]]\nsize = 1\n", "name"),
            ("[[volume]]\nname = \"a\"\n", "neither a size nor a snapshot"),
            ("[[volume]]\nname = \"a\"\nsize = 1\nunencrypted = true\nkey = \"k\"\n", "has a key"),
            ("[[volume]]\nname = \"a\"\nsize = 1\nown-data-key = true\n", "made from a snapshot"),
            ("[[volume]]\nname = \"a\"\nsize = 1\nqueues = 65\n", "1 to 64"),
            ("[[volume]]\nname = \"a\"\nsize = 1\nserial = \"a b\"\n", "without spaces"),
            ("[[volume]]\nname = \"a\"\nsize = 1\nburst = -1\n", "line 4"),
            ("{\"volume\": [{\"name\": \"a\", \"size\": \"1x\"}]}", "line 1 column"),
            ("{\"volume\": [{\"name\": \"a\", \"size\": 1}, {\"name\": \"a\", \"size\": 1}]}", "twice"),
        ] {
            let e = parse(text).expect_err(text);
            assert_eq!(e.kind(), Kind::Usage);
            assert!(e.to_string().contains(words), "{text}: {e}");
        }
    }
}
