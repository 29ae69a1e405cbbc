//! In which order KMS keys are asked that wrap one data key: as the settings say (`key-order`), else as the
//! record has them.
//!
//! Pure: nobody is asked what a key is.

use crate::config::key_order::{KeyOrder, Place};
use crate::kms::KmsKey;
use crate::kms::key_ref::{ProviderName, arn_region, is_same_key};

/// The numbers of `keys` in the order in which they are asked: those that an earlier entry means first, and
/// last those that none means. Of two that are alike in this, the one that the record has first.
pub fn asked(keys: &[KmsKey], order: &KeyOrder) -> Vec<usize> {
    let rank = |n: &usize| {
        let place = order.entries().iter().position(|place| means(place, &keys[*n]));
        place.unwrap_or(order.entries().len())
    };
    let mut numbers: Vec<usize> = (0..keys.len()).collect();
    // It keeps the order of those that are equal.
    numbers.sort_by_key(rank);
    numbers
}

fn means(place: &Place, key: &KmsKey) -> bool {
    match place {
        Place::Provider(name) => *name == key.provider,
        // The region of an embedded KMS's key is a word in the settings, and far from nowhere.
        Place::Region(name) => {
            key.provider == ProviderName::Aws.as_str() && arn_region(&key.key_id) == Some(name)
        }
        Place::Prefix(prefix) => key.key_id.starts_with(prefix.as_str()),
        Place::Key(arn) => is_same_key(&key.provider, arn, &key.key_id),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Settings;

    fn key(provider: &str, region: &str, account: &str) -> KmsKey {
        let id = uuid::Uuid::new_v4();
        KmsKey { provider: provider.into(), key_id: format!("arn:aws:kms:{region}:{account}:key/{id}") }
    }

    #[test]
    fn the_settings_say_who_is_asked_first() {
        let keys = [
            key("aws", "us-east-1", "111122223333"),
            key("embedded", "us-east-1", "000000000000"),
            key("aws", "eu-west-1", "111122223333"),
            key("aws", "eu-west-1", "444455556666"),
        ];
        for (written, expected) in [
            ("", [0, 1, 2, 3]),
            ("'eu-west-1'", [2, 3, 0, 1]),
            ("'us-east-1'", [0, 1, 2, 3]),
            ("'embedded', 'eu-west-1'", [1, 2, 3, 0]),
            ("'arn:aws:kms:eu-west-1:444455556666:key/*', 'aws'", [3, 0, 2, 1]),
            ("'eu-west-3'", [0, 1, 2, 3]),
            (&format!("'{}', '{}'", keys[3].key_id, keys[1].key_id), [3, 1, 0, 2]),
        ] {
            let settings = Settings::parse(&format!("key-order = [{written}]")).unwrap();
            assert_eq!(asked(&keys, &settings.key_order), expected, "{written}");
        }
    }
}
