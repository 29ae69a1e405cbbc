//! `--filter NAME=VALUE` of lists, as EC2 has them, and `KEY=VALUE` of tags.
#![forbid(unsafe_code)]

use crate::base::{Error, Kind, Result};
use crate::catalog::tags::Tags;
use std::str::FromStr;

/// One `NAME=VALUE`.
#[derive(Clone, Debug)]
pub struct Filter {
    name: String,
    value: String,
}

impl FromStr for Filter {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (name, value) = text.split_once('=').ok_or("write it as NAME=VALUE")?;
        Ok(Filter { name: name.into(), value: value.into() })
    }
}

/// # Errors
/// `Usage` for a filter that is none of `fields`, nor one of tags.
pub fn check(filters: &[Filter], fields: &[&str]) -> Result<()> {
    let is_known = |f: &&Filter| {
        fields.contains(&f.name.as_str()) || f.name == "tag-key" || f.name.strip_prefix("tag:").is_some()
    };
    match filters.iter().find(|f| !is_known(f)) {
        None => Ok(()),
        Some(f) => {
            let message = format!(
                "there is no filter {:?}; the filters are {}, tag-key and tag:KEY",
                f.name,
                fields.join(", ")
            );
            Err(Error::new(Kind::Usage, message))
        }
    }
}

/// Whether something with these fields and tags is meant: of filters with one name any
/// must hold, of others all.
pub fn matches(filters: &[Filter], fields: &[(&str, Option<String>)], tags: &Tags) -> bool {
    let holds = |f: &Filter| match f.name.strip_prefix("tag:") {
        Some(key) => tags.get(key) == Some(&f.value),
        None if f.name == "tag-key" => tags.get(&f.value).is_some(),
        None => fields.iter().any(|(name, value)| *name == f.name && value.as_ref() == Some(&f.value)),
    };
    filters.iter().all(|f| filters.iter().any(|other| other.name == f.name && holds(other)))
}

/// One `KEY=VALUE`.
#[derive(Clone, Debug)]
pub struct Tag(pub String, pub String);

impl Tag {
    /// Of a key and its value.
    pub fn of((key, value): (&str, &str)) -> Self {
        Tag(key.into(), value.into())
    }
}

impl FromStr for Tag {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (key, value) = text.split_once('=').ok_or("write it as KEY=VALUE")?;
        Ok(Tag(key.into(), value.into()))
    }
}

/// Adds each of `new` to `tags`.
///
/// # Errors
/// `Usage` for what is outside of EBS's limits.
pub fn set(tags: &mut Tags, new: &[Tag]) -> Result<()> {
    new.iter().try_for_each(|Tag(key, value)| tags.set(key, value))
}

/// Takes each of `keys` away from `tags`.
///
/// # Errors
/// `NotFound` for one that is not there.
pub fn remove(tags: &mut Tags, keys: &[String]) -> Result<()> {
    match keys.iter().find(|key| !tags.remove(key)) {
        None => Ok(()),
        Some(key) => Err(Error::new(Kind::NotFound, format!("there is no tag {key:?}"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn filters_of_one_name_are_alternatives_and_others_conditions() {
        let mut tags = Tags::default();
        set(&mut tags, &["Name=db=1".parse().unwrap(), "env=prod".parse().unwrap()]).unwrap();
        let fields = [("status", Some("available".to_string())), ("name", None)];
        for (texts, expected) in [
            (&["tag:Name=db=1"][..], true),
            (&["tag:Name=db"], false),
            (&["tag-key=env"], true),
            (&["tag-key=Env"], false),
            (&["status=in-use"], false),
            (&["status=in-use", "status=available"], true),
            (&["status=available", "tag:env=test"], false),
            (&["name="], false),
            (&[], true),
        ] {
            let filters: Vec<Filter> = texts.iter().map(|t| t.parse().unwrap()).collect();
            assert_eq!(matches(&filters, &fields, &tags), expected, "{texts:?}");
            assert!(check(&filters, &["status", "name"]).is_ok());
        }
        assert!(check(&["colour=red".parse().unwrap()], &["status"]).is_err());
    }
}
