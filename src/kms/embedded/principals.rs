//! Principals: who may ask the KMS over the wire, and what they may do.
//!
//! The store's own user, who reads root key and log, is not a principal: the command line may do
//! everything. A principal is the root principal, an administrator, who may do everything too, one who may do
//! what grants let him do, or the KMS of another region, which may synchronize multi-Region keys.

use crate::config::regions::is_region;
use crate::kms::embedded::Embedded;
use crate::kms::embedded::audit::Call;
use crate::kms::embedded::blob::{Material, random};
use crate::kms::embedded::grant_records::{GrantName, GrantOperation};
use crate::kms::embedded::records::{AccessKeyEntry, Change, PrincipalEntry, PrincipalName};
use crate::kms::embedded::state::State;
use crate::kms::errors::Exception;
use crate::kms::key_ref::{KeyName, Locality};
use crate::kms::{EncryptionContext, KmsError};
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use uuid::Uuid;
use zeroize::Zeroizing;

/// The name of the root principal.
pub const ROOT: &str = "root";

/// What is told of a principal; never its secret.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PrincipalMetadata {
    /// Its name.
    pub name: String,
    /// Its ARN.
    pub arn: String,
    /// Whether it may do everything.
    pub admin: bool,
    /// The region whose KMS it is, if it is one.
    pub peer: Option<String>,
    /// The ids of its access keys, one or two, the older first.
    pub access_keys: Vec<String>,
    /// When it was made: milliseconds since 1970.
    pub created: i64,
}

/// Who asks for something.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Caller {
    /// Its ARN.
    pub arn: String,
    /// Whether it may do everything.
    pub admin: bool,
    /// The region whose KMS it is, if it is one.
    pub peer: Option<String>,
}

/// A secret access key. Has no Debug.
pub type SecretKey = Zeroizing<String>;

impl Embedded {
    /// The store's own user.
    pub fn owner(&self) -> Caller {
        Caller { arn: self.place.root_arn(), admin: true, peer: None }
    }

    /// Makes a principal and its access key; the secret is shown this once. `root` is the root principal, who
    /// is always an administrator. Makes the store if there is none.
    ///
    /// # Errors
    /// `AlreadyExists` for the name of one; `Validation` for what is no name.
    pub fn create_principal(
        &self,
        name: &str,
        admin: bool,
    ) -> Result<(PrincipalMetadata, SecretKey), KmsError> {
        self.make_principal(name, admin || name == ROOT, None)
    }

    /// Makes a principal that is the KMS of `region`, and its access key, as [`Embedded::create_principal`]
    /// does. It may bring multi-Region keys whose primary key is in that region.
    ///
    /// # Errors
    /// `AlreadyExists` for the name of one; `Validation` for what is no name, and for this KMS's own region.
    pub fn create_peer(&self, name: &str, region: &str) -> Result<(PrincipalMetadata, SecretKey), KmsError> {
        if name == ROOT || region == self.place.region || !is_region(region) {
            let message = format!(
                "{name} cannot be the KMS of {region:?}: root is an administrator, and a peer is in another \
                 region than {}",
                self.place.region
            );
            return Err(KmsError::Validation(message));
        }
        self.make_principal(name, false, Some(region.to_owned()))
    }

    fn make_principal(
        &self,
        name: &str,
        admin: bool,
        peer: Option<String>,
    ) -> Result<(PrincipalMetadata, SecretKey), KmsError> {
        check_name(name)?;
        self.log.create_if_absent()?;
        let made = self.log.write(|log, now| {
            if log.state().principal(name).is_some() {
                let message = format!("there is a principal {name}; delete it first to give it another key");
                return Err(KmsError::AlreadyExists(message));
            }
            let seed = Material::random()?;
            let id = Uuid::new_v4();
            let entry = PrincipalEntry {
                name: name.to_owned(),
                id,
                admin,
                peer: peer.clone(),
                created: now.time,
                access_key: new_access_key()?,
                sealed: log.keys().seal(id, id, &seed)?,
                second: None,
            };
            let answer = (self.principal_metadata(&entry), secret_of(&seed));
            Ok((vec![Change::Principal(entry)], answer))
        });
        let call = Call::new("CreatePrincipal").with("name", name).with("admin", admin);
        let call = if peer.is_some() { call.with("peerRegion", peer) } else { call };
        self.record(call, made)
    }

    /// All principals, by name. Without a store there are none.
    pub fn principals(&self) -> Result<Vec<PrincipalMetadata>, KmsError> {
        if !self.log.exists()? {
            return Ok(Vec::new());
        }
        self.log.read(|log| Ok(log.state().principals().map(|p| self.principal_metadata(p)).collect()))
    }

    /// Gives a principal a second access key, so that the first can be replaced wherever it is used before it
    /// is deleted; the secret is shown this once.
    pub fn create_access_key(&self, name: &str) -> Result<(String, SecretKey), KmsError> {
        let made = self.log.write(|log, now| {
            let mut entry = existing(log.state(), name)?.clone();
            if entry.second.is_some() {
                let message = format!("{name} has two access keys; delete one to make another");
                return Err(KmsError::Other(Exception::LimitExceeded, message));
            }
            let seed = Material::random()?;
            let access_key = new_access_key()?;
            let sealed = log.keys().seal(entry.id, entry.id, &seed)?;
            entry.second = Some(AccessKeyEntry { access_key: access_key.clone(), created: now.time, sealed });
            Ok((vec![Change::Principal(entry)], (access_key, secret_of(&seed))))
        });
        let id = made.as_ref().ok().map(|(access_key, _)| &**access_key);
        self.record(Call::new("CreateAccessKey").with("name", name).answering("accessKeyId", id), made)
    }

    /// Takes one of its two access keys from a principal. No request with it that begins after
    /// this has answered succeeds.
    pub fn delete_access_key(&self, name: &str, access_key: &str) -> Result<(), KmsError> {
        let deleted = self.log.write(|log, _| {
            let mut entry = existing(log.state(), name)?.clone();
            match entry.second.take() {
                Some(second) if second.access_key == access_key => {}
                Some(second) if entry.access_key == access_key => {
                    (entry.access_key, entry.sealed) = (second.access_key, second.sealed);
                }
                None if entry.access_key == access_key => {
                    let message = format!(
                        "{access_key} is the only access key of {name}: make another first, or delete the \
                         principal"
                    );
                    return Err(KmsError::Validation(message));
                }
                _ => return Err(KmsError::NotFound(format!("{name} has no access key {access_key}"))),
            }
            Ok((vec![Change::Principal(entry)], ()))
        });
        let call = Call::new("DeleteAccessKey").with("name", name).with("accessKeyId", access_key);
        self.record(call, deleted)
    }

    /// Removes a principal and the grants that were made for it. No request of its that begins after this has
    /// answered succeeds.
    pub fn delete_principal(&self, name: &str) -> Result<(), KmsError> {
        let deleted = self.log.write(|log, _| {
            let entry = existing(log.state(), name)?;
            let arn = principal_arn(&self.place, &entry.name);
            let grants = log.state().grants().filter(|grant| grant.grantee == arn);
            let mut changes: Vec<Change> = grants
                .map(|grant| Change::GrantDeleted(GrantName { key: grant.key, id: grant.id.clone() }))
                .collect();
            changes.push(Change::PrincipalDeleted(PrincipalName { name: entry.name.clone() }));
            Ok((changes, ()))
        });
        self.record(Call::new("DeletePrincipal").with("name", name), deleted)
    }

    /// Who has this access key, and its secret; `None` if nobody has.
    pub fn principal_of(&self, access_key: &str) -> Result<Option<(Caller, SecretKey)>, KmsError> {
        if !self.log.exists()? {
            return Ok(None);
        }
        self.log.read(|log| {
            let sealed_in = |entry: &PrincipalEntry| {
                let second = entry.second.as_ref().map(|second| (&second.access_key, second.sealed));
                let mut both = std::iter::once((&entry.access_key, entry.sealed)).chain(second);
                both.find(|(id, _)| *id == access_key).map(|(_, sealed)| sealed)
            };
            let mut found = log.state().principals().filter_map(|p| sealed_in(p).map(|sealed| (p, sealed)));
            let Some((entry, sealed)) = found.next() else { return Ok(None) };
            let seed = log.keys().open(entry.id, entry.id, &sealed)?;
            let arn = principal_arn(&self.place, &entry.name);
            let caller = Caller { arn, admin: entry.admin, peer: entry.peer.clone() };
            Ok(Some((caller, secret_of(&seed))))
        })
    }

    /// Whether the principal of this ARN, which has this KMS's account, is one of this KMS's. That account
    /// may be one at AWS, if the settings say so: then whoever was not made here is somebody there.
    pub(super) fn knows(&self, arn: &str) -> bool {
        if self.place.account == Locality::default().account {
            return true;
        }
        let is_made = |p: &PrincipalEntry| principal_arn(&self.place, &p.name) == arn;
        // Where the store cannot be read, whoever asks for the key hears why.
        self.log.read(|log| Ok(log.state().principals().any(is_made))).unwrap_or(false)
    }

    /// Fails unless `caller` may do what only administrators may: `action`, on `resource` (an ARN, or `*`).
    pub fn check_admin(&self, caller: &Caller, action: &str, resource: &str) -> Result<(), KmsError> {
        if caller.admin { Ok(()) } else { Err(denied(caller, action, resource)) }
    }

    /// The region whose KMS `caller` is, which alone may do `action` with the multi-Region
    /// key that `key` names.
    ///
    /// # Errors
    /// `AccessDenied` for everybody else, administrators among them: it is no operation for people.
    pub fn check_peer<'a>(&self, caller: &'a Caller, action: &str, key: &str) -> Result<&'a str, KmsError> {
        caller.peer.as_deref().ok_or_else(|| denied(caller, action, key))
    }

    /// Fails unless `caller` may do `operation` with the key under this context, as administrator or by a
    /// grant. Returns the key's ARN, so that what was allowed and what is done are about one key.
    pub fn check_allowed(
        &self,
        caller: &Caller,
        operation: GrantOperation,
        key: &str,
        context: &EncryptionContext,
    ) -> Result<String, KmsError> {
        if caller.admin
            && let KeyName::Alias(_) = self.place.parse(key)?
        {
            // Its key may have to be made first, or be another one by the time it is used: both are the
            // administrator's right.
            return Ok(key.to_owned());
        }
        self.log.read(|log| {
            let entry = log.state().key(key, &self.place)?;
            let arn = self.place.key_arn(entry.id);
            let granted = || {
                log.state().grants_of(entry.id).any(|grant| {
                    grant.grantee == caller.arn
                        && grant.operations.contains(&operation)
                        && (!operation.has_context() || grant.constraint.allows(context.pairs()))
                })
            };
            if caller.admin || granted() {
                return Ok(arn);
            }
            Err(denied(caller, operation.name(), &arn))
        })
    }

    fn principal_metadata(&self, entry: &PrincipalEntry) -> PrincipalMetadata {
        PrincipalMetadata {
            name: entry.name.clone(),
            arn: principal_arn(&self.place, &entry.name),
            admin: entry.admin,
            peer: entry.peer.clone(),
            access_keys: std::iter::once(&entry.access_key)
                .chain(entry.second.as_ref().map(|second| &second.access_key))
                .cloned()
                .collect(),
            created: entry.created,
        }
    }
}

fn existing<'a>(state: &'a State, name: &str) -> Result<&'a PrincipalEntry, KmsError> {
    state.principal(name).ok_or_else(|| KmsError::NotFound(format!("there is no principal {name}")))
}

/// AccessDeniedException for `action` on `resource`.
pub(super) fn denied(caller: &Caller, action: &str, resource: &str) -> KmsError {
    KmsError::AccessDenied(format!(
        "User: {} is not authorized to perform: kms:{action} on resource: {resource} because no grant allows \
         the kms:{action} action",
        caller.arn
    ))
}

/// Whether `arn` is a principal's that there is. The root principal is there without an access key too.
pub(super) fn is_principal(state: &State, place: &Locality, arn: &str) -> bool {
    arn == place.root_arn() || state.principals().any(|p| principal_arn(place, &p.name) == arn)
}

fn principal_arn(place: &Locality, name: &str) -> String {
    if name == ROOT { place.root_arn() } else { place.user_arn(name) }
}

fn check_name(name: &str) -> Result<(), KmsError> {
    let allowed = |b: u8| b.is_ascii_alphanumeric() || b"+=,.@_-".contains(&b);
    if (1..=64).contains(&name.len()) && name.bytes().all(allowed) {
        return Ok(());
    }
    Err(KmsError::Validation(
        "a principal's name has 1 to 64 characters, letters, digits and +=,.@_-".to_owned(),
    ))
}

/// `AKIA` and 16 characters of base32.
fn new_access_key() -> Result<String, KmsError> {
    let mut bytes = [0; 16];
    random(&mut bytes)?;
    let digit = |b: &u8| char::from(b"ABCDEFGHIJKLMNOPQRSTUVWXYZ234567"[usize::from(b & 31)]);
    Ok("AKIA".chars().chain(bytes.iter().map(digit)).collect())
}

/// 40 characters that stand for 30 bytes of the seed, as AWS's secrets have.
fn secret_of(seed: &Material) -> SecretKey {
    // The room is there from the start: growing would leave a copy behind.
    let mut secret = Zeroizing::new(String::with_capacity(40));
    STANDARD.encode_string(&seed.bytes()[..30], &mut secret);
    secret
}
