//! Keys and aliases as text and as JSON.

use crate::kms::embedded::admin::{AliasMetadata, KeyMetadata};
use crate::kms::embedded::multi_region::Relatives;
use crate::kms::key_ref::id_text;
use serde_json::{Value, json};
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

pub(super) fn list(keys: &[KeyMetadata]) -> (String, Value) {
    let mut rows = vec![["KEY ID", "STATE", "CREATED", "ALIASES", "DESCRIPTION"].map(String::from)];
    rows.extend(keys.iter().map(|k| {
        [
            id_text(k.id),
            k.state.name().into(),
            date(k.created),
            k.aliases.join(","),
            printable(&k.description),
        ]
    }));
    let json = json!({ "keys": keys.iter().map(key_json).collect::<Vec<_>>() });
    (table(&rows), json)
}

pub(super) fn list_aliases(aliases: &[AliasMetadata]) -> (String, Value) {
    let mut rows = vec![["ALIAS", "KEY ID", "UPDATED"].map(String::from)];
    rows.extend(aliases.iter().map(|a| [a.name.clone(), id_text(a.key), date(a.updated)]));
    let json = json!({ "aliases": aliases.iter().map(alias_json).collect::<Vec<_>>() });
    (table(&rows), json)
}

pub(super) fn describe(key: &KeyMetadata) -> String {
    let mut rows = vec![
        ["Key".into(), id_text(key.id)],
        ["ARN".into(), key.arn.clone()],
        ["State".into(), key.state.name().into()],
        ["Created".into(), date(key.created)],
        ["Aliases".into(), key.aliases.join(", ")],
        ["Description".into(), printable(&key.description)],
        ["Key store".into(), key.key_store.as_ref().map_or(String::new(), |(id, _)| id.clone())],
    ];
    let until = || key.expires.map_or("for good".into(), |at| format!("until {}", date(at)));
    match (key.origin, &key.material) {
        ("EXTERNAL", Some(_)) => rows.push(["Material".into(), format!("imported, {}", until())]),
        ("EXTERNAL", None) => rows.push(["Material".into(), "to be imported".into()]),
        _ => {}
    }
    if let Some(relatives) = &key.multi_region {
        rows.extend(relatives_rows(relatives));
    }
    rows.extend(key.deletion.map(|at| ["Deletion".into(), format!("{}, or up to a day later", date(at))]));
    rows.retain(|[_, value]| !value.is_empty());
    table(&rows)
}

/// Where the same key is besides, and what has not come there yet.
pub(super) fn relatives_rows(it: &Relatives) -> Vec<[String; 2]> {
    let primary = if it.is_primary { "this one".to_owned() } else { it.primary.arn.clone() };
    let mut rows = vec![["Primary key".into(), primary]];
    let is_behind = |region: &String| if it.behind.contains(region) { " (not up to date)" } else { "" };
    let replica = |arn: &str, words: &str| ["Replica".to_owned(), format!("{arn}{words}")];
    rows.extend(it.replicas.iter().map(|other| replica(&other.arn, is_behind(&other.region))));
    rows.extend(it.creating.iter().map(|region| replica(region, " (Creating: replicate again)")));
    rows.extend(it.moving_to.iter().map(|to| ["Moving to".into(), format!("{to} (ask again)")]));
    rows
}

pub(super) fn key_json(key: &KeyMetadata) -> Value {
    let mut value = json!({
        "key_id": id_text(key.id),
        "arn": key.arn,
        "state": key.state.name(),
        "enabled": key.state.is_usable(),
        "description": key.description,
        "created": date(key.created),
        "aliases": key.aliases,
    });
    if let Some((id, _)) = &key.key_store {
        value["key_store"] = id.as_str().into();
    }
    if key.origin == "EXTERNAL" {
        value["imported_until"] = match (&key.material, key.expires) {
            (None, _) => Value::Null,
            (Some(_), None) => "for good".into(),
            (Some(_), Some(at)) => date(at).into(),
        };
    }
    if let Some(it) = &key.multi_region {
        value["multi_region"] = json!({
            "primary": it.primary.arn,
            "is_primary": it.is_primary,
            "replicas": it.replicas.iter().map(|replica| &replica.arn).collect::<Vec<_>>(),
            "creating": it.creating,
            "behind": it.behind,
            "moving_to": it.moving_to,
        });
    }
    if let Some(at) = key.deletion {
        value["deletion"] = date(at).into();
    }
    value
}

pub(super) fn alias_json(alias: &AliasMetadata) -> Value {
    json!({
        "alias": alias.name,
        "arn": alias.arn,
        "key_id": id_text(alias.key),
        "created": date(alias.created),
        "updated": date(alias.updated),
    })
}

/// ISO 8601 in UTC, whole seconds.
pub(in crate::cli) fn date(milliseconds: i64) -> String {
    OffsetDateTime::from_unix_timestamp(milliseconds.div_euclid(1000))
        .ok()
        .and_then(|t| t.format(&Rfc3339).ok())
        .unwrap_or_else(|| format!("{milliseconds} ms after 1970"))
}

/// An operator's words on one line, without what a terminal would obey.
fn printable(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { ' ' } else { c }).collect()
}

/// Columns as wide as their widest cell; the last one is left as it is.
fn table<const N: usize>(rows: &[[String; N]]) -> String {
    let width = |column: usize| rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0);
    let widths: [usize; N] = std::array::from_fn(width);
    let line = |row: &[String; N]| {
        let cells = row.iter().zip(widths).map(|(cell, width)| format!("{cell:width$}")).collect::<Vec<_>>();
        format!("{}\n", cells.join("  ").trim_end())
    };
    rows.iter().map(line).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tables_are_aligned_and_descriptions_cannot_steer_the_terminal() {
        let rows = [["A".into(), "B".into()], ["longer".into(), printable("x\x1b[2J")]];
        assert_eq!(table(&rows), "A       B\nlonger  x [2J\n");
        assert_eq!(date(0), "1970-01-01T00:00:00Z");
    }
}
