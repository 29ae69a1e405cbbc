//! A session with a token, by PKCS#11. What is here runs in the process that has the module alone.
//!
//! Each question finds its key anew: objects have handles for one session only. An object that is not a
//! secret AES key which cannot leave the token is no key of ours, whatever its id is.

use crate::hsm::message::{Answer, Bytes, IV_LEN, Place, Problem, Question, Refusal, TEXT_MAX};
use crate::hsm::module::Secret;
use cryptoki::context::{CInitializeArgs, CInitializeFlags, Pkcs11};
use cryptoki::error::{Error, RvError};
use cryptoki::mechanism::aead::GcmParams;
use cryptoki::mechanism::{Mechanism, MechanismType};
use cryptoki::object::{Attribute, AttributeType, KeyType, ObjectClass, ObjectHandle};
use cryptoki::session::{Session as TokenSession, UserType};
use cryptoki::slot::Slot;
use cryptoki::types::{RawAuthPin, Ulong};
use zeroize::{Zeroize, Zeroizing};

const TAG_BITS: u64 = 128;
const KEY_BYTES: u64 = 32;

type Outcome<T> = std::result::Result<T, Refusal>;

/// A session that is logged in.
pub(super) struct Session {
    module: Pkcs11,
    slot: Slot,
    session: TokenSession,
}

impl Session {
    /// Loads the module and logs in; the PIN is wiped.
    pub(super) fn begin(place: &Place, pin: &mut [u8]) -> Outcome<Self> {
        let module = Pkcs11::new(&place.module).map_err(|e| {
            Refusal::new(
                Problem::NoModule,
                format!("load the PKCS#11 module {}: {e}", place.module.display()),
            )
        })?;
        module
            .initialize(CInitializeArgs::new(CInitializeFlags::OS_LOCKING_OK))
            .map_err(|e| refusal("initialize the PKCS#11 module", &e))?;
        let slot = slot_of(&module, place)?;
        let mechanisms =
            module.get_mechanism_list(slot).map_err(|e| refusal("ask what the token can do", &e))?;
        for (mechanism, name) in
            [(MechanismType::AES_GCM, "CKM_AES_GCM"), (MechanismType::AES_KEY_GEN, "CKM_AES_KEY_GEN")]
        {
            if !mechanisms.contains(&mechanism) {
                let words = format!("{place} has no {name}, which keys of a KMS need");
                return Err(Refusal::new(Problem::Unsuitable, words));
            }
        }
        let session = module.open_ro_session(slot).map_err(|e| refusal("open a session", &e))?;
        let raw = RawAuthPin::new(Box::new(pin.to_vec()));
        pin.zeroize();
        match session.login_with_raw(UserType::User, &raw) {
            Ok(()) | Err(Error::Pkcs11(RvError::UserAlreadyLoggedIn, _)) => {}
            Err(e) => return Err(refusal(&format!("log in to {place}"), &e)),
        }
        Ok(Session { module, slot, session })
    }

    /// Answers a question, with what goes into the memory.
    pub(super) fn answer(&mut self, question: &Question, secret: &[u8]) -> Outcome<(Answer, Option<Secret>)> {
        let answer = match question {
            Question::Begin { .. } => {
                return Err(Refusal::new(Problem::Unsuitable, "it has begun already"));
            }
            Question::Make { id, label } => self.make(id, label).map(|()| Answer::Done)?,
            Question::Find { id } => Answer::Found(self.find(id)?.is_some()),
            Question::Destroy { id } => self.destroy(id).map(|()| Answer::Done)?,
            Question::Encrypt { id, iv, aad, .. } => self.encrypt(id, iv, aad, secret)?,
            Question::Decrypt { id, iv, aad, text } => {
                return Ok((Answer::Done, Some(self.decrypt(id, iv, aad, text)?)));
            }
            Question::Random { len } => {
                let mut bytes = Zeroizing::new(vec![0; (*len).min(TEXT_MAX)]);
                let filled = self.session.generate_random_slice(&mut bytes);
                filled.map_err(|e| refusal("get random bytes", &e))?;
                return Ok((Answer::Done, Some(bytes)));
            }
        };
        Ok((answer, None))
    }

    fn make(&self, id: &Bytes, label: &str) -> Outcome<()> {
        let session = self.writing()?;
        let template = [
            Attribute::Class(ObjectClass::SECRET_KEY),
            Attribute::KeyType(KeyType::AES),
            Attribute::ValueLen(Ulong::new(KEY_BYTES)),
            Attribute::Id(id.0.clone()),
            Attribute::Label(label.as_bytes().to_vec()),
            Attribute::Token(true),
            Attribute::Private(true),
            Attribute::Sensitive(true),
            Attribute::Extractable(false),
            Attribute::Modifiable(false),
            Attribute::Encrypt(true),
            Attribute::Decrypt(true),
            Attribute::Sign(false),
            Attribute::Verify(false),
            Attribute::Wrap(false),
            Attribute::Unwrap(false),
            Attribute::Derive(false),
        ];
        let made = session.generate_key(&Mechanism::AesKeyGen, &template);
        let made = made.map_err(|e| refusal("make a key in the token", &e))?;
        if !self.is_ours(made)? {
            let _ = session.destroy_object(made);
            let words = "the token made a key that could leave it; it was destroyed again";
            return Err(Refusal::new(Problem::Unsuitable, words));
        }
        Ok(())
    }

    /// The one key of this id that cannot leave the token.
    fn find(&self, id: &Bytes) -> Outcome<Option<ObjectHandle>> {
        let found = self.objects(&self.session, id)?;
        match found[..] {
            [] => Ok(None),
            [key] if self.is_ours(key)? => Ok(Some(key)),
            [_] => Err(Refusal::new(
                Problem::NoKey,
                format!("the object {} of the token is not a key that cannot leave it", hex::encode(&id.0)),
            )),
            _ => Err(Refusal::new(
                Problem::NoKey,
                format!("the token has {} objects of the id {}", found.len(), hex::encode(&id.0)),
            )),
        }
    }

    fn key(&self, id: &Bytes) -> Outcome<ObjectHandle> {
        let absent = || format!("the token has no key of the id {}", hex::encode(&id.0));
        self.find(id)?.ok_or_else(|| Refusal::new(Problem::NoKey, absent()))
    }

    fn destroy(&self, id: &Bytes) -> Outcome<()> {
        let session = self.writing()?;
        for object in self.objects(&session, id)? {
            session.destroy_object(object).map_err(|e| refusal("destroy a key in the token", &e))?;
        }
        Ok(())
    }

    fn encrypt(&self, id: &Bytes, iv: &Bytes, aad: &Bytes, plaintext: &[u8]) -> Outcome<Answer> {
        let key = self.key(id)?;
        let mut iv = iv.0.clone();
        let text = {
            let mechanism = gcm(&mut iv, &aad.0)?;
            self.session
                .encrypt(&mechanism, key, plaintext)
                .map_err(|e| refusal("encrypt in the token", &e))?
        };
        Ok(Answer::Encrypted { iv: Bytes(iv), text: Bytes(text) })
    }

    fn decrypt(&self, id: &Bytes, iv: &Bytes, aad: &Bytes, text: &Bytes) -> Outcome<Secret> {
        let key = self.key(id)?;
        let mut iv = iv.0.clone();
        let opened = {
            let mechanism = gcm(&mut iv, &aad.0)?;
            self.session.decrypt(&mechanism, key, &text.0)
        };
        match opened {
            Ok(plaintext) => Ok(Zeroizing::new(plaintext)),
            Err(e) if could_be_the_ciphertext(&e) && self.works(key) => {
                Err(Refusal::new(Problem::BadCiphertext, "the token does not decrypt it"))
            }
            Err(e) => Err(refusal("decrypt in the token", &e)),
        }
    }

    /// Whether the key encrypts and decrypts now: several tokens have one word for a wrong tag
    /// and for their own failure.
    fn works(&self, key: ObjectHandle) -> bool {
        let (mut iv, aad) = ([7; IV_LEN], *b"sealblk");
        if getrandom::fill(&mut iv).is_err() {
            return false;
        }
        let sealed = match gcm(&mut iv, &aad) {
            Ok(mechanism) => self.session.encrypt(&mechanism, key, b"does it work"),
            Err(_) => return false,
        };
        let Ok(sealed) = sealed else { return false };
        let Ok(mechanism) = gcm(&mut iv, &aad) else { return false };
        self.session.decrypt(&mechanism, key, &sealed).is_ok_and(|opened| opened == b"does it work")
    }

    fn objects(&self, session: &TokenSession, id: &Bytes) -> Outcome<Vec<ObjectHandle>> {
        let template = [Attribute::Class(ObjectClass::SECRET_KEY), Attribute::Id(id.0.clone())];
        session.find_objects(&template).map_err(|e| refusal("look for a key in the token", &e))
    }

    /// Whether it is an AES key that the token does not give out.
    fn is_ours(&self, key: ObjectHandle) -> Outcome<bool> {
        let wanted = [
            Attribute::KeyType(KeyType::AES),
            Attribute::Token(true),
            Attribute::Sensitive(true),
            Attribute::Extractable(false),
        ];
        let types = [
            AttributeType::KeyType,
            AttributeType::Token,
            AttributeType::Sensitive,
            AttributeType::Extractable,
        ];
        let found = self.session.get_attributes(key, &types);
        let found = found.map_err(|e| refusal("look at a key in the token", &e))?;
        Ok(wanted.iter().all(|wanted| found.contains(wanted)))
    }

    fn writing(&self) -> Outcome<TokenSession> {
        self.module
            .open_rw_session(self.slot)
            .map_err(|e| refusal("open a session that may change the token", &e))
    }
}

fn gcm<'a>(iv: &'a mut [u8], aad: &'a [u8]) -> Outcome<Mechanism<'a>> {
    let params = GcmParams::new(iv, aad, Ulong::new(TAG_BITS));
    params.map(Mechanism::AesGcm).map_err(|e| refusal("say how to encrypt", &e))
}

fn slot_of(module: &Pkcs11, place: &Place) -> Outcome<Slot> {
    let slots = module.get_slots_with_token().map_err(|e| refusal("list the module's tokens", &e))?;
    let mut found = Vec::new();
    for slot in slots {
        // A token may go between the two calls; it is not the one then.
        let Ok(token) = module.get_token_info(slot) else { continue };
        if token.label().trim_end() == place.token {
            found.push((slot, token.serial_number().trim_end().to_owned()));
        }
    }
    match &found[..] {
        [(slot, _)] => Ok(*slot),
        [] => Err(Refusal::new(Problem::NoToken, format!("there is no such token: {place}"))),
        several => {
            let serials: Vec<&str> = several.iter().map(|(_, serial)| serial.as_str()).collect();
            let words = format!("several tokens are {place}: {}", serials.join(", "));
            Err(Refusal::new(Problem::NoToken, words))
        }
    }
}

/// Whether a token may say so of a ciphertext, or additional data, that is not the one that it has made.
fn could_be_the_ciphertext(e: &Error) -> bool {
    matches!(
        e,
        Error::Pkcs11(
            RvError::GeneralError
                | RvError::FunctionFailed
                | RvError::EncryptedDataInvalid
                | RvError::EncryptedDataLenRange
                | RvError::DataInvalid
                | RvError::DataLenRange
                | RvError::SignatureInvalid
                | RvError::SignatureLenRange
                | RvError::ArgumentsBad
                | RvError::MechanismParamInvalid,
            _
        )
    )
}

/// What a token has answered to what was attempted.
fn refusal(attempt: &str, e: &Error) -> Refusal {
    let problem = match e {
        Error::Pkcs11(RvError::PinIncorrect | RvError::PinInvalid | RvError::PinLenRange, _) => {
            Problem::WrongPin
        }
        Error::Pkcs11(
            RvError::PinLocked | RvError::PinExpired | RvError::UserPinNotInitialized | RvError::PinTooWeak,
            _,
        ) => Problem::PinLocked,
        Error::Pkcs11(
            RvError::MechanismInvalid
            | RvError::TemplateInconsistent
            | RvError::TemplateIncomplete
            | RvError::AttributeTypeInvalid
            | RvError::AttributeValueInvalid
            | RvError::KeySizeRange
            | RvError::FunctionNotSupported
            | RvError::TokenWriteProtected,
            _,
        )
        | Error::NotSupported
        | Error::NullFunctionPointer
        | Error::MissingSymbol(_) => Problem::Unsuitable,
        Error::LibraryLoading(_) => Problem::NoModule,
        _ => Problem::Lost,
    };
    Refusal::new(problem, format!("{attempt}: {}", said(e)))
}

/// The function that has answered, and what, in the words of the standard.
fn said(e: &Error) -> String {
    match e {
        Error::Pkcs11(code, function) => format!("C_{function:?} answers {}", name_of(&format!("{code:?}"))),
        other => other.to_string(),
    }
}

/// `CKR_PIN_INCORRECT` for `PinIncorrect`.
fn name_of(code: &str) -> String {
    let mut name = String::from("CKR");
    for letter in code.chars() {
        if letter.is_ascii_uppercase() {
            name.push('_');
        }
        name.push(letter.to_ascii_uppercase());
    }
    name
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_have_the_names_of_the_standard() {
        let e = Error::Pkcs11(RvError::PinIncorrect, cryptoki::context::Function::Login);
        let refusal = refusal("log in", &e);
        assert_eq!(
            (refusal.problem, refusal.words.as_str()),
            (Problem::WrongPin, "log in: C_Login answers CKR_PIN_INCORRECT")
        );
    }

    #[test]
    fn what_may_be_the_ciphertext_is_a_matter_of_the_code() {
        let of = |code| Error::Pkcs11(code, cryptoki::context::Function::Decrypt);
        assert!(could_be_the_ciphertext(&of(RvError::GeneralError)));
        assert!(!could_be_the_ciphertext(&of(RvError::SessionHandleInvalid)));
        assert_eq!(refusal("decrypt", &of(RvError::DeviceRemoved)).problem, Problem::Lost);
        assert_eq!(refusal("decrypt", &of(RvError::MechanismInvalid)).problem, Problem::Unsuitable);
    }
}
