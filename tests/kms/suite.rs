//! What every key provider must do, whichever it is: one suite, run by a test file for each provider.
//!
//! It sees a provider through `KeyProvider` and changes the state of its keys through [`Admin`].

use sealblk::kms::embedded::Embedded;
use sealblk::kms::embedded::page::Piece;
use sealblk::kms::{
    EncryptionContext, Grant, GrantRequest, KeyProvider, KeyState, KmsError, ListedGrant, WrappedKey,
};

/// What an operator does at the provider, outside of `KeyProvider`. Keys are named by ARN.
pub trait Admin {
    /// A new enabled key's ARN.
    fn create_key(&self) -> String;
    /// The ARN of a key that never was.
    fn absent_key(&self) -> String;
    /// CreateAlias.
    fn create_alias(&self, name: &str, key: &str) -> Result<(), KmsError>;
    /// EnableKey.
    fn enable(&self, key: &str) -> Result<(), KmsError>;
    /// DisableKey.
    fn disable(&self, key: &str) -> Result<(), KmsError>;
    /// ScheduleKeyDeletion with the shortest window.
    fn schedule_deletion(&self, key: &str) -> Result<(), KmsError>;
    /// CancelKeyDeletion.
    fn cancel_deletion(&self, key: &str) -> Result<(), KmsError>;
    /// ListGrants.
    fn grants(&self, key: &str) -> Vec<SeenGrant>;
}

/// A grant as the provider's administrator sees it.
#[derive(Debug, PartialEq, Eq)]
pub struct SeenGrant {
    pub id: String,
    pub grantee: String,
    pub retiring: Option<String>,
    pub operations: Vec<&'static str>,
    pub subset: Option<EncryptionContext>,
}

/// A provider under test.
pub struct Subject<'a> {
    pub provider: &'a dyn KeyProvider,
    pub admin: &'a dyn Admin,
    /// A principal that grants can be made for, as which the provider may retire them.
    pub grantee: String,
    /// What is answered to the ARN of a key in the region mars-north-1; none: it is the key all the same.
    pub elsewhere: Option<KmsError>,
}

/// The administrator of an embedded KMS, and of whatever serves it.
impl Admin for Embedded {
    fn create_key(&self) -> String {
        Embedded::create_key(self, "", None).unwrap().arn
    }
    fn absent_key(&self) -> String {
        self.locality().key_arn(uuid::Uuid::new_v4())
    }
    fn create_alias(&self, name: &str, key: &str) -> Result<(), KmsError> {
        Embedded::create_alias(self, name, key)
    }
    fn enable(&self, key: &str) -> Result<(), KmsError> {
        Embedded::enable(self, key).map(drop)
    }
    fn disable(&self, key: &str) -> Result<(), KmsError> {
        Embedded::disable(self, key).map(drop)
    }
    fn schedule_deletion(&self, key: &str) -> Result<(), KmsError> {
        Embedded::schedule_deletion(self, key, 7).map(drop)
    }
    fn cancel_deletion(&self, key: &str) -> Result<(), KmsError> {
        Embedded::cancel_deletion(self, key).map(drop)
    }
    fn grants(&self, key: &str) -> Vec<SeenGrant> {
        let grants = Embedded::grants(self, key, None, None, &Piece::default()).unwrap().items;
        let seen = grants.into_iter().map(|grant| SeenGrant {
            id: grant.id,
            grantee: grant.grantee,
            retiring: grant.retiring,
            operations: grant.operations.iter().map(|operation| operation.name()).collect(),
            subset: grant.constraint.subset.map(EncryptionContext::from),
        });
        seen.collect()
    }
}

/// The whole suite. `alias_prefix` keeps the aliases of several runs apart where they would meet.
pub fn run(subject: &Subject<'_>, alias_prefix: &str) {
    subject.data_keys_are_random_and_come_back();
    subject.every_form_of_a_name_means_the_same_key(alias_prefix);
    subject.a_context_must_be_presented_exactly();
    subject.a_changed_blob_never_opens();
    subject.a_blob_opens_only_with_its_own_key();
    subject.states_are_honoured_and_named();
    subject.rewrapping_keeps_the_data_key();
    subject.data_keys_made_elsewhere_can_be_wrapped();
    subject.names_of_nothing_are_refused();
    subject.lengths_have_limits();
    subject.grants_are_for_one_context_and_end();
}

fn volume(id: &str) -> EncryptionContext {
    EncryptionContext::pair("aws:ebs:id", id)
}

/// The resource of an ARN: `key/<id>` without `key/`.
fn id_of(arn: &str) -> &str {
    arn.rsplit_once("key/").expect("a key ARN").1
}

impl Subject<'_> {
    fn wrap(&self, key: &str, context: &EncryptionContext) -> WrappedKey {
        self.provider.generate_wrapped(key, 64, context).expect("wrap a data key")
    }

    fn open(&self, wrapped: &WrappedKey, context: &EncryptionContext) -> Result<Vec<u8>, KmsError> {
        self.provider.decrypt(wrapped, context).map(|plaintext| plaintext.to_vec())
    }

    fn data_keys_are_random_and_come_back(&self) {
        let (key, context) = (self.admin.create_key(), volume("vol-1"));
        let (one, two) = (self.wrap(&key, &context), self.wrap(&key, &context));
        let plaintext = self.open(&one, &context).unwrap();
        assert_eq!(plaintext.len(), 64);
        assert_eq!(self.open(&one, &context).unwrap(), plaintext);
        assert_ne!(self.open(&two, &context).unwrap(), plaintext);
        let leaked = |blob: &[u8]| blob.windows(16).any(|w| plaintext.windows(16).any(|p| p == w));
        assert!(!leaked(&one.blob) && one.blob.len() <= 6144);
    }

    fn every_form_of_a_name_means_the_same_key(&self, alias_prefix: &str) {
        let (key, context) = (self.admin.create_key(), volume("vol-1"));
        let alias = format!("alias/{alias_prefix}suite");
        self.admin.create_alias(&alias, &key).unwrap();
        let alias_arn = key.replace(&format!("key/{}", id_of(&key)), &alias);
        for name in [key.as_str(), id_of(&key), &alias, &alias_arn] {
            let wrapped = self.wrap(name, &context);
            assert_eq!(wrapped.key_id, key, "{name}");
            self.open(&wrapped, &context).unwrap();
            let named = WrappedKey { key_id: name.to_owned(), ..wrapped };
            self.open(&named, &context).unwrap();
            let description = self.provider.describe(name).unwrap();
            assert_eq!((description.key_id.as_str(), description.state), (key.as_str(), KeyState::Enabled));
        }
    }

    fn a_context_must_be_presented_exactly(&self) {
        let key = self.admin.create_key();
        let pairs = |pairs: &[(&str, &str)]| {
            let owned = pairs.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned()));
            EncryptionContext::from(owned.collect::<std::collections::BTreeMap<_, _>>())
        };
        let contexts = [
            pairs(&[]),
            pairs(&[("ab", "c")]),
            pairs(&[("a", "bc")]),
            pairs(&[("AB", "c")]),
            pairs(&[("ab", "C")]),
            pairs(&[("a", "b"), ("c", "d")]),
            pairs(&[("a", "bcd")]),
            pairs(&[("a", "b"), ("c", "e")]),
            pairs(&[("a", "d"), ("c", "b")]),
        ];
        for (i, made_with) in contexts.iter().enumerate() {
            let wrapped = self.wrap(&key, made_with);
            for (j, presented) in contexts.iter().enumerate() {
                let opened = self.open(&wrapped, presented);
                assert_eq!(opened.is_ok(), i == j, "{made_with:?} presented as {presented:?}");
                assert!(i == j || opened == Err(KmsError::InvalidCiphertext));
            }
        }
    }

    fn a_changed_blob_never_opens(&self) {
        let (key, context) = (self.admin.create_key(), volume("vol-1"));
        let wrapped = self.wrap(&key, &context);
        let refused = |blob: Vec<u8>, what: String| {
            let changed = WrappedKey { key_id: key.clone(), blob };
            let error = self.open(&changed, &context).expect_err(&what);
            // A changed key id in the blob names another key, or none.
            let other_key = matches!(error, KmsError::IncorrectKey(_) | KmsError::AccessDenied(_));
            assert!(error == KmsError::InvalidCiphertext || other_key, "{what}: {error:?}");
        };
        for at in 0..wrapped.blob.len() {
            let mut blob = wrapped.blob.clone();
            blob[at] ^= 1 << (at % 8);
            refused(blob, format!("byte {at} flipped"));
        }
        refused(wrapped.blob[..wrapped.blob.len() - 1].to_vec(), "cut short".into());
        refused([&wrapped.blob[..], &[0]].concat(), "made longer".into());
        let garbage = WrappedKey { key_id: key.clone(), blob: b"garbage".to_vec() };
        assert_eq!(self.open(&garbage, &context), Err(KmsError::InvalidCiphertext));
    }

    fn a_blob_opens_only_with_its_own_key(&self) {
        let (key, other, context) = (self.admin.create_key(), self.admin.create_key(), volume("vol-1"));
        let wrapped = WrappedKey { key_id: other, ..self.wrap(&key, &context) };
        let message = "The key ID in the request does not identify a CMK that can perform this operation.";
        assert_eq!(self.open(&wrapped, &context), Err(KmsError::IncorrectKey(message.into())));
    }

    /// Every use of a key that is in no state for it fails with `expected`.
    fn unusable(&self, key: &str, wrapped: &WrappedKey, good: &str, expected: &KmsError) {
        let context = volume("vol-1");
        let provider = self.provider;
        assert_eq!(self.open(wrapped, &context).as_ref(), Err(expected));
        assert_eq!(provider.generate_wrapped(key, 64, &context).as_ref(), Err(expected));
        assert_eq!(provider.rewrap(wrapped, &context, good, &context).as_ref(), Err(expected));
        let from_good = self.wrap(good, &context);
        assert_eq!(provider.rewrap(&from_good, &context, key, &context).as_ref(), Err(expected));
    }

    fn states_are_honoured_and_named(&self) {
        let (key, good, context) = (self.admin.create_key(), self.admin.create_key(), volume("vol-1"));
        let state = || self.provider.describe(&key).unwrap().state;
        let wrapped = self.wrap(&key, &context);
        let plaintext = self.open(&wrapped, &context).unwrap();
        let not_pending = KmsError::InvalidState(format!("{key} is not pending deletion."));
        assert_eq!(self.admin.cancel_deletion(&key), Err(not_pending.clone()));

        self.admin.disable(&key).unwrap();
        self.admin.disable(&key).unwrap();
        assert_eq!(state(), KeyState::Disabled);
        self.unusable(&key, &wrapped, &good, &KmsError::Disabled(format!("{key} is disabled.")));
        assert_eq!(self.admin.cancel_deletion(&key), Err(not_pending));
        self.admin.enable(&key).unwrap();
        assert_eq!(self.open(&wrapped, &context).unwrap(), plaintext);

        self.admin.schedule_deletion(&key).unwrap();
        assert_eq!(state(), KeyState::PendingDeletion);
        let pending = KmsError::PendingDeletion(format!("{key} is pending deletion."));
        self.unusable(&key, &wrapped, &good, &pending);
        assert_eq!(self.admin.enable(&key), Err(pending.clone()));
        assert_eq!(self.admin.disable(&key), Err(pending.clone()));
        assert_eq!(self.admin.schedule_deletion(&key), Err(pending.clone()));
        assert_eq!(self.admin.create_alias("alias/of-a-dying-key", &key), Err(pending));

        self.admin.cancel_deletion(&key).unwrap();
        assert_eq!(state(), KeyState::Disabled);
        self.admin.enable(&key).unwrap();
        assert_eq!(self.open(&wrapped, &context).unwrap(), plaintext);
    }

    fn rewrapping_keeps_the_data_key(&self) {
        let (key, other) = (self.admin.create_key(), self.admin.create_key());
        let (from, to) = (volume("vol-1"), volume("snap-1"));
        let wrapped = self.wrap(&key, &from);
        let plaintext = self.open(&wrapped, &from).unwrap();
        for target in [&key, &other] {
            let rewrapped = self.provider.rewrap(&wrapped, &from, target, &to).unwrap();
            assert_eq!(&rewrapped.key_id, target);
            assert_eq!(self.open(&rewrapped, &to).unwrap(), plaintext);
            assert_eq!(self.open(&rewrapped, &from), Err(KmsError::InvalidCiphertext));
        }
        let wrong = self.provider.rewrap(&wrapped, &to, &other, &to);
        assert_eq!(wrong, Err(KmsError::InvalidCiphertext));
    }

    fn data_keys_made_elsewhere_can_be_wrapped(&self) {
        let (key, context) = (self.admin.create_key(), volume("vol-1"));
        let plaintext: Vec<u8> = (0..64).collect();
        let wrapped = self.provider.wrap(&key, &plaintext, &context).unwrap();
        assert_eq!(wrapped.key_id, key);
        assert_eq!(self.open(&wrapped, &context).unwrap(), plaintext);
        assert_eq!(self.open(&wrapped, &volume("vol-2")), Err(KmsError::InvalidCiphertext));
    }

    fn names_of_nothing_are_refused(&self) {
        let (key, context) = (self.admin.create_key(), volume("vol-1"));
        let absent = self.admin.absent_key();
        let describe = |name: &str| self.provider.describe(name).map(|d| d.key_id);
        let not_found = |message: String| Err(KmsError::NotFound(message));
        let message = format!("Key '{absent}' does not exist");
        assert_eq!(describe(&absent), not_found(message.clone()));
        assert_eq!(describe(id_of(&absent)), not_found(message.clone()));
        let generated = self.provider.generate_wrapped(&absent, 64, &context).map(|w| w.key_id);
        assert_eq!(generated, not_found(message));
        let alias_arn = key.replace(&format!("key/{}", id_of(&key)), "alias/no-such-alias");
        assert_eq!(describe("alias/no-such-alias"), not_found(format!("Alias {alias_arn} is not found.")));
        assert_eq!(describe("no key"), not_found("Invalid keyId 'no key'".into()));
        let region = key.split(':').nth(3).unwrap();
        let elsewhere = key.replace(&format!(":{region}:"), ":mars-north-1:");
        let expected = self.elsewhere.clone().map_or(Ok(key), Err);
        assert_eq!(describe(&elsewhere), expected);
    }

    fn lengths_have_limits(&self) {
        let (key, context) = (self.admin.create_key(), volume("vol-1"));
        for len in [1, 32, 1024] {
            let wrapped = self.provider.generate_wrapped(&key, len, &context).unwrap();
            assert_eq!(self.open(&wrapped, &context).unwrap().len(), len);
        }
        let refused = |len: usize, bound: &str| {
            let message = format!(
                "1 validation error detected: Value '{len}' at 'numberOfBytes' failed to satisfy constraint: \
                 Member must have value {bound}"
            );
            let error = self.provider.generate_wrapped(&key, len, &context).unwrap_err();
            assert_eq!(error, KmsError::Validation(message));
        };
        refused(0, "greater than or equal to 1");
        refused(1025, "less than or equal to 1024");
    }

    fn grants_are_for_one_context_and_end(&self) {
        let (key, context) = (self.admin.create_key(), volume("vol-1"));
        let wrapped = self.wrap(&key, &context);
        let grantee = &self.grantee;
        let request = GrantRequest { key: &key, grantee, context: &context, name: "one" };
        let grant = self.provider.create_grant(&request).unwrap();
        assert_eq!(
            self.provider.create_grant(&request).unwrap().id,
            grant.id,
            "the same request is the same grant"
        );
        let seen = SeenGrant {
            id: grant.id.clone(),
            grantee: grantee.clone(),
            retiring: Some(grantee.clone()),
            operations: vec!["Decrypt"],
            subset: Some(context.clone()),
        };
        assert_eq!(self.admin.grants(&key), [seen]);
        let token = grant.token.clone().expect("a token");
        let opened = self.provider.decrypt_granted(&wrapped, &context, &token).unwrap();
        assert_eq!(opened.to_vec(), self.open(&wrapped, &context).unwrap());
        let refused = self.provider.decrypt_granted(&wrapped, &context, "bm9uZQ==").unwrap_err();
        assert_eq!(refused.type_name(), "InvalidGrantTokenException");

        let other = self.provider.create_grant(&GrantRequest { name: "two", ..request }).unwrap();
        assert_ne!(other.id, grant.id);
        let mut listed = self.provider.grants_for(&key, grantee).unwrap();
        listed.sort_by(|a, b| a.name.cmp(&b.name));
        let listing = |id: &str, name: &str| ListedGrant { id: id.into(), name: Some(name.into()) };
        assert_eq!(listed, [listing(&grant.id, "one"), listing(&other.id, "two")]);
        let another = self.admin.create_key();
        assert_eq!(self.provider.grants_for(&another, grantee).unwrap(), [], "of that key alone");
        self.provider.retire_grant(&grant).unwrap();
        // Who has lost the token names it by its id.
        self.provider.retire_grant(&Grant { token: None, ..other.clone() }).unwrap();
        assert_eq!(self.admin.grants(&key), []);
        let gone = self.provider.retire_grant(&Grant { token: None, ..other }).unwrap_err();
        assert_eq!(gone.type_name(), "NotFoundException");

        self.admin.disable(&key).unwrap();
        let disabled = KmsError::Disabled(format!("{key} is disabled."));
        assert_eq!(self.provider.create_grant(&request), Err(disabled));
    }
}
