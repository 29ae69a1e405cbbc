//! Only the keys that the settings allow (`kms-keys`): before a KMS is asked to make, wrap or unwrap a data
//! key, or for a grant.
//!
//! A record in the store says under which key a data key is. Whoever can write the store could name a key of
//! his own there, in a KMS that this host reaches, and wait for the data keys that are made under it.

use crate::audit::AuditKey;
use crate::config::kms_keys::Entry;
use crate::config::{Settings, shown_file};
use crate::kms::key_ref::{KeyName, Locality};
use crate::kms::{
    Capabilities, EncryptionContext, Grant, GrantRequest, KeyDescription, KeyProvider, KeyRef, KmsError,
    ListedGrant, WrappedKey,
};
use uuid::Uuid;
use zeroize::Zeroizing;

/// What the settings say.
pub(super) struct Rules {
    /// None: every key.
    rules: Option<Vec<Rule>>,
    here: Locality,
}

/// Which keys one entry allows.
enum Rule {
    /// All of the provider of this name.
    Provider(String),
    /// Those of this provider whose ARN begins so.
    Place(&'static str, String),
    /// One, or what an alias means.
    Key(KeyRef),
    /// The one of this ARN, whichever KMS has it: there are no two.
    Arn(String),
}

impl Rules {
    /// # Errors
    /// Validation for an entry that is none in this place.
    pub(super) fn new(settings: &Settings) -> Result<Self, KmsError> {
        let here = settings.locality.clone();
        let rule = |entry: &Entry| {
            let rule = Rule::new(entry, &here);
            rule.map_err(|e| {
                KmsError::Validation(format!("kms-keys in {}: {entry}: {e}", shown_file().display()))
            })
        };
        let rules = settings.kms_keys.entries().map(|entries| entries.iter().map(rule).collect());
        Ok(Rules { rules: rules.transpose()?, here })
    }

    /// `provider` for these keys alone.
    pub(super) fn guard(self, provider: Box<dyn KeyProvider>) -> Box<dyn KeyProvider> {
        match self.rules {
            None => provider,
            Some(rules) => Box::new(Allowed { inner: provider, rules, here: self.here }),
        }
    }
}

impl Rule {
    fn new(entry: &Entry, here: &Locality) -> Result<Self, KmsError> {
        Ok(match entry {
            Entry::Provider(name) => Rule::Provider(name.clone()),
            Entry::Place(text) => {
                // The ARN of a key that cannot be, to learn whose it would be.
                let nil = Uuid::nil().to_string();
                let any = KeyRef::parse(&format!("{}{nil}", text.trim_end_matches('*')), here)?;
                let prefix = any.key.strip_suffix(&nil).unwrap_or_default().to_owned();
                Rule::Place(any.provider.as_str(), prefix)
            }
            // Whose it is does not matter: no two KMSs have keys of one id.
            Entry::Key(text) if is_key_arn(text) => Rule::Arn(text.clone()),
            Entry::Key(text) => Rule::Key(KeyRef::parse(text, here)?),
        })
    }
}

/// A provider, for some keys.
struct Allowed {
    inner: Box<dyn KeyProvider>,
    rules: Vec<Rule>,
    here: Locality,
}

impl Allowed {
    /// # Errors
    /// NotAllowed for another key; the KMS's, where it has to tell what an alias means.
    fn check(&self, key: &str) -> Result<(), KmsError> {
        let key = self.plain(key);
        if self.is_named(&key) {
            return Ok(());
        }
        // What an alias means its KMS alone can tell. That gives nothing away, and an ARN is judged without
        // asking anybody.
        let arn = match is_key_arn(&key) {
            true => key.clone(),
            false => match self.inner.describe(&key) {
                Ok(described) => described.key_id,
                Err(KmsError::NotFound(_)) => return Err(self.refusal(&key)),
                Err(e) => return Err(e),
            },
        };
        if self.is_named(&arn) || self.is_meant(&arn)? { Ok(()) } else { Err(self.refusal(&key)) }
    }

    /// The same for a key that a record names, which is by its ARN: an alias could mean another key a moment
    /// later.
    fn check_recorded(&self, key: &str) -> Result<(), KmsError> {
        match is_key_arn(key) {
            true => self.check(key),
            false => Err(self.refusal(key)),
        }
    }

    /// The key as the rules have it: one that the embedded KMS knows by an id, by its ARN.
    fn plain(&self, key: &str) -> String {
        if self.inner.name() != "embedded" {
            return key.to_owned();
        }
        match self.here.parse(key) {
            Ok(KeyName::Id(id)) => self.here.key_arn(id),
            Ok(KeyName::Alias(name)) => name,
            Err(_) => key.to_owned(),
        }
    }

    /// Whether an entry has the key in these words, or one for all of its kind.
    fn is_named(&self, key: &str) -> bool {
        self.rules.iter().any(|rule| match rule {
            Rule::Provider(name) => name == self.inner.name(),
            Rule::Place(name, prefix) => *name == self.inner.name() && key.starts_with(prefix.as_str()),
            Rule::Arn(arn) => arn == key,
            Rule::Key(named) => self.is_here(named) && self.plain(&named.key) == key,
        })
    }

    /// Whether the key of this ARN is what an entry means that is no ARN.
    fn is_meant(&self, arn: &str) -> Result<bool, KmsError> {
        for rule in &self.rules {
            let Rule::Key(named) = rule else { continue };
            if !self.is_here(named) || is_key_arn(&self.plain(&named.key)) {
                continue;
            }
            match self.inner.describe(&named.key) {
                Ok(described) if described.key_id == arn => return Ok(true),
                Ok(_) | Err(KmsError::NotFound(_)) => {}
                Err(e) => return Err(e),
            }
        }
        Ok(false)
    }

    fn is_here(&self, named: &KeyRef) -> bool {
        named.provider.as_str() == self.inner.name()
    }

    fn refusal(&self, key: &str) -> KmsError {
        KmsError::NotAllowed(format!(
            "{}: {key} is not one of the kms-keys in {}, and no data key is asked for there",
            self.inner.name(),
            shown_file().display()
        ))
    }
}

fn is_key_arn(key: &str) -> bool {
    key.starts_with("arn:") && key.splitn(6, ':').nth(5).is_some_and(|resource| resource.starts_with("key/"))
}

impl KeyProvider for Allowed {
    fn name(&self) -> &'static str {
        self.inner.name()
    }

    fn region(&self, key: &str) -> Option<String> {
        self.inner.region(key)
    }

    fn describe(&self, key: &str) -> Result<KeyDescription, KmsError> {
        self.check(key)?;
        self.inner.describe(key)
    }

    fn generate_wrapped(
        &self,
        key: &str,
        len: usize,
        context: &EncryptionContext,
    ) -> Result<WrappedKey, KmsError> {
        self.check(key)?;
        self.inner.generate_wrapped(key, len, context)
    }

    fn decrypt(
        &self,
        wrapped: &WrappedKey,
        context: &EncryptionContext,
    ) -> Result<Zeroizing<Vec<u8>>, KmsError> {
        self.check_recorded(&wrapped.key_id)?;
        self.inner.decrypt(wrapped, context)
    }

    fn rewrap(
        &self,
        wrapped: &WrappedKey,
        from: &EncryptionContext,
        key: &str,
        to: &EncryptionContext,
    ) -> Result<WrappedKey, KmsError> {
        self.check_recorded(&wrapped.key_id)?;
        self.check(key)?;
        self.inner.rewrap(wrapped, from, key, to)
    }

    fn wrap(&self, key: &str, data_key: &[u8], context: &EncryptionContext) -> Result<WrappedKey, KmsError> {
        self.check(key)?;
        self.inner.wrap(key, data_key, context)
    }

    fn capabilities(&self) -> Capabilities {
        self.inner.capabilities()
    }

    fn decrypt_granted(
        &self,
        wrapped: &WrappedKey,
        context: &EncryptionContext,
        token: &str,
    ) -> Result<Zeroizing<Vec<u8>>, KmsError> {
        self.check_recorded(&wrapped.key_id)?;
        self.inner.decrypt_granted(wrapped, context, token)
    }

    fn create_grant(&self, request: &GrantRequest<'_>) -> Result<Grant, KmsError> {
        self.check(request.key)?;
        self.inner.create_grant(request)
    }

    // A grant that was made before is this host's to retire, whatever the settings say now.
    fn retire_grant(&self, grant: &Grant) -> Result<(), KmsError> {
        self.inner.retire_grant(grant)
    }

    fn grants_for(&self, key: &str, grantee: &str) -> Result<Vec<ListedGrant>, KmsError> {
        self.inner.grants_for(key, grantee)
    }

    fn audit_key(&self) -> Result<Option<AuditKey>, KmsError> {
        self.inner.audit_key()
    }
}
