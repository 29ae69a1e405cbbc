//! The metrics of KMS keys: what "sealblk watch" has heard of those that volumes need. Nobody is asked here.

use crate::catalog::metadata::KeyRecord;
use crate::catalog::slots::KeySlot;
use crate::kms::KmsKey;
use crate::ops::metrics::text::{Text, Type};
use crate::ops::observe::Observed;
use crate::ops::watch::{Health, Known, Outlook};
use std::collections::BTreeMap;

/// Writes all of them; nothing where "sealblk watch" has never run.
pub(super) fn write(text: &mut Text, volumes: &[Observed], known: &BTreeMap<KmsKey, Known>) {
    if known.is_empty() {
        return;
    }
    text.family(
        "sealblk_volume_key_usable",
        Type::Gauge,
        "Whether the KMS would let the next attach have the volume's data key, when it was asked last.",
    );
    for it in volumes {
        let Ok(metadata) = &it.entry.metadata else { continue };
        let id = metadata.id().to_string();
        let slots = metadata.keys().iter().flat_map(KeyRecord::slots);
        let mut keys: Vec<KmsKey> = slots.map(KeySlot::kms_key).collect();
        keys.sort();
        keys.dedup();
        // Of one that was not reached, nothing is known.
        let states = keys.iter().filter_map(|key| Some((key, known.get(key)?.state)));
        for (key, state) in states.filter(|(_, state)| *state != Health::Unreachable) {
            let labels = [
                ("volume", &*id),
                ("name", it.entry.name().unwrap_or("")),
                ("provider", &*key.provider),
                ("key_id", &*key.key_id),
            ];
            text.sample(&labels, u8::from(state == Health::Usable));
        }
    }
    text.family(
        "sealblk_volume_attachable",
        Type::Gauge,
        "Whether a KMS would let the next attach have each of the volume's data keys, by one KMS key or \
         another.",
    );
    for it in volumes {
        let Ok(metadata) = &it.entry.metadata else { continue };
        let outlook = Outlook::of(metadata.keys(), known);
        let worst = outlook.and_then(|outlook| outlook.worst).filter(|state| *state != Health::Unreachable);
        if let Some(state) = worst {
            let id = metadata.id().to_string();
            let labels = [("volume", &*id), ("name", it.entry.name().unwrap_or(""))];
            text.sample(&labels, u8::from(state == Health::Usable));
        }
    }
    text.family("sealblk_kms_key_reachable", Type::Gauge, "Whether the key's KMS could be asked.");
    for (key, known) in known {
        text.sample(&labels(key), u8::from(known.state != Health::Unreachable));
    }
    text.family(
        "sealblk_kms_key_asked_age_seconds",
        Type::Gauge,
        "How long ago \"sealblk watch\" asked for the key.",
    );
    for (key, known) in known {
        text.sample(&labels(key), known.checked.age().as_secs());
    }
    text.family(
        "sealblk_kms_key_deletion_time_seconds",
        Type::Gauge,
        "When the KMS deletes the key, since the epoch; of keys whose deletion is scheduled.",
    );
    for (key, known) in known {
        if let Some(deletion) = known.deletion {
            text.sample(&labels(key), deletion.since_epoch());
        }
    }
}

fn labels(key: &KmsKey) -> [(&str, &str); 2] {
    [("provider", &key.provider), ("key_id", &key.key_id)]
}
