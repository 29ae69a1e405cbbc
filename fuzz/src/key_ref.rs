//! Key references as an operator types them.

use sealblk::kms::key_ref::{KeyName, Locality};
use sealblk::kms::{KeyRef, KmsError, ProviderName};

/// Any text.
pub fn run(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    let here = Locality::default();
    match here.parse(text) {
        Ok(KeyName::Id(id)) => assert_eq!(here.parse(&here.key_arn(id)), Ok(KeyName::Id(id))),
        Ok(KeyName::Alias(name)) => {
            assert!(name.starts_with("alias/") && name.len() <= 256);
            assert_eq!(here.parse(&here.alias_arn(&name)), Ok(KeyName::Alias(name)));
        }
        Err(e) => assert!(matches!(e, KmsError::NotFound(_))),
    }
    if let Ok(reference) = KeyRef::parse(text, &here) {
        // What is printed means the same when it is typed.
        assert_eq!(KeyRef::parse(&reference.to_string(), &here), Ok(reference.clone()));
        assert!(text.ends_with(&reference.key));
        let known = here.parse(&reference.key).is_ok();
        assert!(known || reference.provider == ProviderName::Aws);
    }
}
