//! Grants: what somebody who may do nothing may do with one key, and under which contexts.
//!
//! A grant holds as soon as CreateGrant has answered, so its token is needed for nothing
//! but to name the grant.

use crate::kms::embedded::Embedded;
use crate::kms::embedded::audit::Call;
use crate::kms::embedded::blob::random;
use crate::kms::embedded::grant_records::{Constraint, GrantEntry, GrantName, GrantOperation};
use crate::kms::embedded::keys::{LogKeys, same};
use crate::kms::embedded::page::{Page, Piece};
use crate::kms::embedded::principals::{Caller, denied, is_principal};
use crate::kms::embedded::records::{Change, KeyEntry};
use crate::kms::embedded::state::State;
use crate::kms::key_ref::id_text;
use crate::kms::{Exception, KmsError};
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde_json::json;

/// Grants of one key.
pub const GRANTS_MAX: usize = 50_000;
/// Pairs in a constraint.
pub const PAIRS_MAX: usize = 8;
/// Characters of a key or a value in a constraint.
pub const PAIR_TEXT_MAX: usize = 384;
/// Grant tokens in one request.
pub const TOKENS_MAX: usize = 10;
/// Grants in a piece of a list, where no limit is asked for.
const PAGE: u32 = 50;

/// What CreateGrant is asked for.
#[derive(Clone, Debug, Default)]
pub struct NewGrant<'a> {
    /// ARN of the principal that it is for.
    pub grantee: &'a str,
    /// ARN of the principal that may retire it.
    pub retiring: Option<&'a str>,
    /// What it lets the grantee do.
    pub operations: &'a [GrantOperation],
    /// The contexts that it is good for.
    pub constraint: Constraint,
    /// A name, 1..=256 of `[a-zA-Z0-9:/_-]`: the same request with the same name is the same grant.
    pub name: Option<&'a str>,
}

/// A grant, and what names it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Granted {
    /// Its id: 64 hex digits.
    pub id: String,
    /// Its token.
    pub token: String,
}

/// Which grant is meant.
#[derive(Clone, Copy, Debug)]
pub enum GrantRef<'a> {
    /// By its token.
    Token(&'a str),
    /// By key and id.
    Id {
        /// A key argument.
        key: &'a str,
        /// The grant's id.
        grant: &'a str,
    },
}

impl Embedded {
    /// CreateGrant. Whoever has a grant for CreateGrant can give away no more than that grant.
    pub fn create_grant(
        &self,
        caller: &Caller,
        key: &str,
        new: &NewGrant<'_>,
        dry_run: bool,
    ) -> Result<Granted, KmsError> {
        check_new(new)?;
        let granted = self.log.write(|log, now| {
            let state = log.state();
            let entry = state.key(key, &self.place)?;
            let mut operations = new.operations.to_vec();
            operations.sort();
            operations.dedup();
            let mut grant = GrantEntry {
                key: entry.id,
                id: new_id()?,
                name: new.name.map(str::to_owned),
                created: now.time,
                grantee: new.grantee.to_owned(),
                retiring: new.retiring.map(str::to_owned),
                issuer: caller.arn.clone(),
                operations,
                constraint: new.constraint.clone(),
            };
            self.check_may_grant(state, caller, &grant)?;
            entry.check_usable(&self.place)?;
            for arn in [Some(new.grantee), new.retiring].into_iter().flatten() {
                if !is_principal(state, &self.place, arn) {
                    let message = format!("ARN does not refer to a valid principal: {arn}");
                    return Err(KmsError::Other(Exception::InvalidArn, message));
                }
            }
            let same = state.grants_of(entry.id).find(|known| is_same_request(known, &grant));
            if let Some(same) = same {
                grant = same.clone();
            } else if state.grants_of(entry.id).len() >= GRANTS_MAX {
                return Err(self.too_many(entry));
            }
            if dry_run {
                return Err(KmsError::dry_run());
            }
            let granted = Granted { id: grant.id.clone(), token: token(log.keys(), &grant.id) };
            let changes = if same.is_some() { Vec::new() } else { vec![Change::Grant(grant)] };
            Ok((changes, granted))
        });
        let operations: Vec<&str> = new.operations.iter().map(|operation| operation.name()).collect();
        let call = Call::new("CreateGrant").on(key).with("granteePrincipal", new.grantee);
        let call = call.with("retiringPrincipal", new.retiring).with("operations", operations);
        let (equals, subset) = (&new.constraint.equals, &new.constraint.subset);
        let call = call.with(
            "constraints",
            json!({ "encryptionContextEquals": equals, "encryptionContextSubset": subset }),
        );
        let id = granted.as_ref().ok().map(|granted| &*granted.id);
        self.record(call.answering("grantId", id), granted)
    }

    /// ListGrants, by id; only those with this id or grantee, where one is given.
    pub fn grants(
        &self,
        key: &str,
        id: Option<&str>,
        grantee: Option<&str>,
        piece: &Piece,
    ) -> Result<Page<GrantEntry>, KmsError> {
        self.current(|log| {
            let entry = log.state().key(key, &self.place)?;
            let grants = log.state().grants_of(entry.id).filter(|grant| {
                id.is_none_or(|id| grant.id == id) && grantee.is_none_or(|arn| grant.grantee == arn)
            });
            piece.of(grants.cloned(), |grant| grant.id.clone(), PAGE)
        })
    }

    /// ListRetirableGrants: those of all keys that `principal` may retire by being named so, by key and id.
    pub fn retirable_grants(
        &self,
        caller: &Caller,
        principal: &str,
        piece: &Piece,
    ) -> Result<Page<GrantEntry>, KmsError> {
        if !caller.admin && caller.arn != principal {
            return Err(denied(caller, "ListRetirableGrants", "*"));
        }
        self.current(|log| {
            let grants = log.state().grants().filter(|grant| grant.retiring.as_deref() == Some(principal));
            piece.of(grants.cloned(), |grant| format!("{}/{}", grant.key, grant.id), PAGE)
        })
    }

    /// RetireGrant: by its retiring principal, by a grantee whose grant allows it, or by an administrator.
    pub fn retire_grant(&self, caller: &Caller, grant: GrantRef<'_>, dry_run: bool) -> Result<(), KmsError> {
        let retired = self.log.write(|log, _| {
            let found = match grant {
                GrantRef::Id { key, grant } => self.find_grant(log.state(), key, grant)?,
                GrantRef::Token(token) => {
                    let id = read_token(log.keys(), token)?;
                    log.state().grants().find(|grant| grant.id == id).ok_or_else(invalid_token)?
                }
            };
            let retiring = found.retiring.as_deref() == Some(&caller.arn);
            let grantee =
                found.grantee == caller.arn && found.operations.contains(&GrantOperation::RetireGrant);
            if !(caller.admin || retiring || grantee) {
                return Err(denied(caller, "RetireGrant", &self.place.key_arn(found.key)));
            }
            let named = (id_text(found.key), found.id.clone());
            end(found, dry_run).map(|(changes, ())| (changes, named))
        });
        let named = match (&retired, grant) {
            (Ok((key, id)), _) => Call::new("RetireGrant").on(key).with("grantId", &**id),
            (Err(_), GrantRef::Id { key, grant }) => Call::new("RetireGrant").on(key).with("grantId", grant),
            (Err(_), GrantRef::Token(_)) => Call::new("RetireGrant"),
        };
        self.record(named, retired.map(drop))
    }

    /// RevokeGrant. What the grantee begins after this has answered fails.
    pub fn revoke_grant(&self, key: &str, id: &str, dry_run: bool) -> Result<(), KmsError> {
        let revoked = self.log.write(|log, _| end(self.find_grant(log.state(), key, id)?, dry_run));
        self.record(Call::new("RevokeGrant").on(key).with("grantId", id), revoked)
    }

    /// Fails unless each is the token of a grant of this store's, there still or not.
    pub fn check_tokens(&self, tokens: &[String]) -> Result<(), KmsError> {
        if tokens.is_empty() {
            return Ok(());
        }
        if tokens.len() > TOKENS_MAX {
            return Err(KmsError::Validation(format!(
                "1 validation error detected: Value at 'grantTokens' failed to satisfy constraint: Member \
                 must have length less than or equal to {TOKENS_MAX}"
            )));
        }
        self.log.read(|log| tokens.iter().try_for_each(|token| read_token(log.keys(), token).map(drop)))
    }

    fn check_may_grant(&self, state: &State, caller: &Caller, new: &GrantEntry) -> Result<(), KmsError> {
        let covers = |mine: &GrantEntry| {
            mine.grantee == caller.arn
                && mine.operations.contains(&GrantOperation::CreateGrant)
                && new.operations.iter().all(|operation| mine.operations.contains(operation))
                && new.constraint.is_within(&mine.constraint)
        };
        if caller.admin || state.grants_of(new.key).any(covers) {
            return Ok(());
        }
        Err(denied(caller, "CreateGrant", &self.place.key_arn(new.key)))
    }

    fn find_grant<'a>(&self, state: &'a State, key: &str, id: &str) -> Result<&'a GrantEntry, KmsError> {
        let entry = state.key(key, &self.place)?;
        state.grants_of(entry.id).find(|grant| grant.id == id).ok_or_else(|| {
            KmsError::NotFound(format!("Grant {id} of {} is not found", self.place.key_arn(entry.id)))
        })
    }

    fn too_many(&self, key: &KeyEntry) -> KmsError {
        let arn = self.place.key_arn(key.id);
        KmsError::Other(
            Exception::LimitExceeded,
            format!("{arn} has {GRANTS_MAX} grants, which is the limit."),
        )
    }
}

fn end(grant: &GrantEntry, dry_run: bool) -> Result<(Vec<Change>, ()), KmsError> {
    if dry_run {
        return Err(KmsError::dry_run());
    }
    Ok((vec![Change::GrantDeleted(GrantName { key: grant.key, id: grant.id.clone() })], ()))
}

/// AWS answers a request that was made before, name included, with the grant that it made then.
fn is_same_request(known: &GrantEntry, new: &GrantEntry) -> bool {
    new.name.is_some()
        && GrantEntry {
            id: new.id.clone(),
            created: new.created,
            issuer: new.issuer.clone(),
            ..known.clone()
        } == *new
}

fn check_new(new: &NewGrant<'_>) -> Result<(), KmsError> {
    let invalid = |field: &str, what: &str| {
        Err(KmsError::Validation(format!(
            "1 validation error detected: Value at '{field}' failed to satisfy constraint: Member must {what}"
        )))
    };
    if new.operations.is_empty() {
        return invalid("operations", "not be empty");
    }
    let allowed = |b: u8| b.is_ascii_alphanumeric() || b":/_-".contains(&b);
    if new.name.is_some_and(|name| name.is_empty() || name.len() > 256 || !name.bytes().all(allowed)) {
        return invalid("name", "satisfy regular expression pattern: ^[a-zA-Z0-9:/_-]{1,256}$");
    }
    for (pairs, field) in [
        (&new.constraint.equals, "constraints.encryptionContextEquals"),
        (&new.constraint.subset, "constraints.encryptionContextSubset"),
    ] {
        let Some(pairs) = pairs else { continue };
        if pairs.len() > PAIRS_MAX {
            return invalid(field, &format!("have length less than or equal to {PAIRS_MAX}"));
        }
        let mut texts = pairs.iter().flat_map(|(key, value)| [key, value]);
        if texts.any(|text| text.chars().count() > PAIR_TEXT_MAX) {
            return invalid(field, &format!("have length less than or equal to {PAIR_TEXT_MAX}"));
        }
    }
    Ok(())
}

fn new_id() -> Result<String, KmsError> {
    let mut id = [0; 32];
    random(&mut id)?;
    Ok(hex::encode(id))
}

/// The grant's id and a MAC of it, so that a token of another store, or none at all, is told apart.
fn token(keys: &LogKeys, id: &str) -> String {
    let mut bytes = id.as_bytes().to_vec();
    bytes.extend_from_slice(&keys.mac("grant token", &[id.as_bytes()]));
    STANDARD.encode(bytes)
}

fn read_token(keys: &LogKeys, token: &str) -> Result<String, KmsError> {
    let bytes = STANDARD.decode(token).map_err(|_| invalid_token())?;
    let (id, mac) = bytes.split_last_chunk::<32>().ok_or_else(invalid_token)?;
    if !same(mac, &keys.mac("grant token", &[id])) {
        return Err(invalid_token());
    }
    String::from_utf8(id.to_vec()).map_err(|_| invalid_token())
}

fn invalid_token() -> KmsError {
    KmsError::Other(Exception::InvalidGrantToken, "The grant token is not valid.".into())
}
