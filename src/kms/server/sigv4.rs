//! AWS Signature Version 4: whether a request was made by whoever has the secret of the
//! access key that it names.
//!
//! Pure: a request, the time and a secret in, yes or AWS's own refusal out; and the header of a request of
//! our own. Answers are signed as well where one KMS asks another, which AWS has no way for. Signatures in
//! the query ("presigned URLs") are not accepted: nobody needs them for a KMS, and they end in logs.

use crate::kms::server::wire::WireError;
use hmac::{Hmac, KeyInit, Mac};
use sha2::{Digest, Sha256};
use subtle::ConstantTimeEq;
use time::macros::format_description;
use time::{Duration, OffsetDateTime, PrimitiveDateTime};
use zeroize::Zeroizing;

/// How far a request's clock may be from ours, either way.
const SKEW: Duration = Duration::minutes(5);
const ALGORITHM: &str = "AWS4-HMAC-SHA256";
const SERVICE: &str = "kms";
/// What ends the scope of a request's signature, and what ends that of an answer's.
const REQUEST: &str = "aws4_request";
const ANSWER: &str = "sealblk_answer";

/// The header with the signature of an answer.
pub const ANSWER_SIGNATURE: &str = "sealblk-answer-signature";

/// A request as far as it is signed. Header names are in lower case.
pub struct Signed<'a> {
    /// The method.
    pub method: &'a str,
    /// The path, as it was sent.
    pub path: &'a str,
    /// What stands behind the path's `?`.
    pub query: &'a str,
    /// All headers, in the order in which they were sent.
    pub headers: &'a [(String, String)],
    /// The body.
    pub body: &'a [u8],
}

/// What an Authorization header says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Authorization {
    /// Whose secret has signed.
    pub access_key: String,
    date: String,
    region: String,
    signed_headers: Vec<String>,
    signature: String,
}

/// What the answer to one request is signed with: those who have the secret that has signed the request have
/// it, and it is good for that answer alone.
pub struct AnswerKey {
    // In the heap, so that no move leaves a copy behind.
    key: Box<Zeroizing<[u8; 32]>>,
    request: String,
}

impl AnswerKey {
    /// The signature of the answer with this HTTP status and body.
    pub fn sign(&self, status: u16, body: &[u8]) -> String {
        hex::encode(&self.mac(status, body)[..])
    }

    /// Whether this is that signature.
    pub fn is_signed(&self, status: u16, body: &[u8], signature: &str) -> bool {
        let expected = self.sign(status, body);
        expected.as_bytes().ct_eq(signature.as_bytes()).into()
    }

    /// All but the body have one length.
    fn mac(&self, status: u16, body: &[u8]) -> Zeroizing<[u8; 32]> {
        let hash = hex::encode(Sha256::digest(body));
        mac(&self.key[..], format!("{}\n{status:05}\n{hash}", self.request).as_bytes())
    }
}

impl Authorization {
    /// Parses the header of a request at `now`, and checks all that needs no secret.
    pub fn of(request: &Signed<'_>, region: &str, now: OffsetDateTime) -> Result<Self, WireError> {
        let header = request.header("authorization").ok_or_else(missing)?;
        let authorization = Self::parse(header)?;
        authorization.check_scope(region)?;
        authorization.check_headers(request)?;
        authorization.check_time(request, now)?;
        // Session tokens are made by nobody here.
        if request.header("x-amz-security-token").is_some() {
            return Err(unrecognized());
        }
        Ok(authorization)
    }

    fn parse(header: &str) -> Result<Self, WireError> {
        let rest = header.strip_prefix(ALGORITHM).filter(|rest| rest.starts_with(' ')).ok_or_else(|| {
            incomplete(
                "Unsupported AWS 'algorithm': the Authorization header must begin with AWS4-HMAC-SHA256.",
            )
        })?;
        let part = |name: &str| {
            let mut parts = rest.split(',').filter_map(|part| part.trim().split_once('='));
            parts.find(|(key, _)| *key == name).map(|(_, value)| value).filter(|value| !value.is_empty())
        };
        let required = |name: &str| {
            part(name)
                .ok_or_else(|| incomplete(&format!("Authorization header requires '{name}' parameter.")))
        };
        let (credential, signed, signature) =
            (required("Credential")?, required("SignedHeaders")?, required("Signature")?);
        let scope: Vec<&str> = credential.split('/').collect();
        let [access_key, date, region, service, "aws4_request"] = scope[..] else {
            return Err(incomplete(
                "Credential must have exactly 5 slash-delimited elements, e.g. \
                 keyid/date/region/service/aws4_request.",
            ));
        };
        if service != SERVICE {
            return Err(invalid(format!("Credential should be scoped to correct service: '{SERVICE}'. ")));
        }
        Ok(Authorization {
            access_key: access_key.to_owned(),
            date: date.to_owned(),
            region: region.to_owned(),
            signed_headers: signed.split(';').map(str::to_owned).collect(),
            signature: signature.to_owned(),
        })
    }

    fn check_scope(&self, region: &str) -> Result<(), WireError> {
        if self.region == region {
            return Ok(());
        }
        Err(invalid(format!("Credential should be scoped to a valid region, not '{}'. ", self.region)))
    }

    /// What decides the meaning of a request must be signed, and signed headers must be there.
    fn check_headers(&self, request: &Signed<'_>) -> Result<(), WireError> {
        let is_signed = |name: &str| self.signed_headers.iter().any(|signed| signed == name);
        let decisive = ["host", "x-amz-target", "x-amz-date", "x-amz-security-token", "x-amz-content-sha256"];
        let missing = decisive.iter().find(|name| request.header(name).is_some() && !is_signed(name));
        if let Some(name) = missing {
            return Err(invalid(format!("'{name}' must be a 'SignedHeader' in the AWS Authorization.")));
        }
        let sorted = self.signed_headers.windows(2).all(|pair| pair[0] < pair[1]);
        let present = self.signed_headers.iter().all(|name| request.header(name).is_some());
        if !sorted || !present || !is_signed("host") {
            return Err(incomplete(
                "SignedHeaders must name headers of the request, 'host' among them, sorted and without \
                 doubles.",
            ));
        }
        Ok(())
    }

    fn check_time(&self, request: &Signed<'_>, now: OffsetDateTime) -> Result<(), WireError> {
        let text = request
            .header("x-amz-date")
            .ok_or_else(|| incomplete("Authorization header requires existence of a 'X-Amz-Date' header."))?;
        let time = parse_time(text).ok_or_else(|| {
            incomplete("Date must be in ISO-8601 'basic format', such as 20260102T030405Z.")
        })?;
        if text.get(..8) != Some(&self.date) {
            return Err(invalid(format!(
                "Date in Credential scope does not match YYYYMMDD from ISO-8601 version of date from HTTP: \
                 '{}' != '{}', from '{text}'.",
                self.date,
                &text[..8]
            )));
        }
        let bound = |at: OffsetDateTime, sign: &str| {
            format!("{} ({} {sign} 5 min.)", format_time(at), format_time(now))
        };
        if time < now - SKEW {
            return Err(invalid(format!(
                "Signature expired: {text} is now earlier than {}",
                bound(now - SKEW, "-")
            )));
        }
        if time > now + SKEW {
            return Err(invalid(format!(
                "Signature not yet current: {text} is still later than {}",
                bound(now + SKEW, "+")
            )));
        }
        Ok(())
    }

    /// Fails unless `secret` has signed this request, body included.
    pub fn check(&self, request: &Signed<'_>, secret: &str) -> Result<(), WireError> {
        let hash = hex::encode(Sha256::digest(request.body));
        if request.header("x-amz-content-sha256").is_some_and(|claimed| claimed != hash) {
            return Err(invalid("The body does not have the hash that x-amz-content-sha256 says."));
        }
        let expected = self.signature(request, &hash, secret);
        if expected.as_bytes().ct_eq(self.signature.as_bytes()).into() {
            return Ok(());
        }
        Err(invalid(
            "The request signature we calculated does not match the signature you provided. Check your AWS \
             Secret Access Key and signing method. Consult the service documentation for details.",
        ))
    }

    /// What `secret` signs this request with, whose body has this hash.
    fn signature(&self, request: &Signed<'_>, hash: &str, secret: &str) -> String {
        let time = request.header("x-amz-date").unwrap_or_default();
        let canonical = self.canonical(request, hash);
        let to_sign = format!(
            "{ALGORITHM}\n{time}\n{}\n{}",
            self.scope(),
            hex::encode(Sha256::digest(canonical.as_bytes()))
        );
        hex::encode(mac(&self.signing_key(secret, REQUEST)[..], to_sign.as_bytes()))
    }

    /// What the answer is signed with, where `secret` has signed the request.
    pub fn answer_key(&self, secret: &str) -> AnswerKey {
        AnswerKey { key: Box::new(self.signing_key(secret, ANSWER)), request: self.signature.clone() }
    }

    fn scope(&self) -> String {
        format!("{}/{}/{SERVICE}/{REQUEST}", self.date, self.region)
    }

    fn canonical(&self, request: &Signed<'_>, hash: &str) -> String {
        let mut text = format!("{}\n{}\n{}\n", request.method, request.path, request.query);
        for name in &self.signed_headers {
            let values = request.headers.iter().filter(|(known, _)| known == name);
            let words =
                |value: &str| value.split(' ').filter(|w| !w.is_empty()).collect::<Vec<_>>().join(" ");
            let values: Vec<String> = values.map(|(_, value)| words(value)).collect();
            text.push_str(&format!("{name}:{}\n", values.join(",")));
        }
        text.push_str(&format!("\n{}\n{hash}", self.signed_headers.join(";")));
        text
    }

    fn signing_key(&self, secret: &str, what: &str) -> Zeroizing<[u8; 32]> {
        let first = Zeroizing::new(format!("AWS4{secret}"));
        let mut key = mac(first.as_bytes(), self.date.as_bytes());
        for part in [self.region.as_str(), SERVICE, what] {
            key = mac(&key[..], part.as_bytes());
        }
        key
    }
}

impl Signed<'_> {
    /// The first header of this name.
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(known, _)| known == name).map(|(_, value)| value.as_str())
    }
}

/// The Authorization header of a request to the KMS of `region`: `secret` signs all of its headers, which are
/// sorted, and `x-amz-date` is one of them. And what its answer is signed with.
pub fn authorization(
    request: &Signed<'_>,
    region: &str,
    access_key: &str,
    secret: &str,
) -> (String, AnswerKey) {
    let date = request.header("x-amz-date").and_then(|time| time.get(..8)).unwrap_or_default();
    let mut authorization = Authorization {
        access_key: access_key.to_owned(),
        date: date.to_owned(),
        region: region.to_owned(),
        signed_headers: request.headers.iter().map(|(name, _)| name.clone()).collect(),
        signature: String::new(),
    };
    let hash = hex::encode(Sha256::digest(request.body));
    authorization.signature = authorization.signature(request, &hash, secret);
    let header = format!(
        "{ALGORITHM} Credential={access_key}/{}, SignedHeaders={}, Signature={}",
        authorization.scope(),
        authorization.signed_headers.join(";"),
        authorization.signature
    );
    (header, authorization.answer_key(secret))
}

/// `now` as `x-amz-date` has it.
pub fn date_header(now: OffsetDateTime) -> String {
    format_time(now)
}

/// What is answered to an access key or a session token that nobody has.
pub fn unrecognized() -> WireError {
    WireError::new("UnrecognizedClientException", "The security token included in the request is invalid.")
}

fn missing() -> WireError {
    WireError::new("MissingAuthenticationTokenException", "Missing Authentication Token")
}

fn incomplete(message: &str) -> WireError {
    WireError::new("IncompleteSignatureException", message)
}

fn invalid(message: impl Into<String>) -> WireError {
    WireError::new("InvalidSignatureException", message)
}

fn mac(key: &[u8], text: &[u8]) -> Zeroizing<[u8; 32]> {
    let mut mac = <Hmac<Sha256> as KeyInit>::new_from_slice(key).expect("HMAC takes a key of any length");
    mac.update(text);
    Zeroizing::new(mac.finalize().into_bytes().into())
}

fn parse_time(text: &str) -> Option<OffsetDateTime> {
    let format = format_description!("[year][month][day]T[hour][minute][second]Z");
    PrimitiveDateTime::parse(text, format).ok().map(PrimitiveDateTime::assume_utc)
}

fn format_time(time: OffsetDateTime) -> String {
    let format = format_description!("[year][month][day]T[hour][minute][second]Z");
    time.format(format).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;
    use time::macros::datetime;

    const NOW: OffsetDateTime = datetime!(2026-01-02 03:04:05 UTC);
    const SECRET: &str = "wJalrXUtnFEMI/K7MDENG+bPxRfiCYEXAMPLEKEY";

    /// A request that is signed by botocore's own algorithm for these headers and this body.
    fn headers() -> Vec<(String, String)> {
        let header = |name: &str, value: &str| (name.to_owned(), value.to_owned());
        vec![
            header("host", "127.0.0.1:8000"),
            header("x-amz-date", "20260102T030405Z"),
            header("x-amz-target", "TrentService.ListKeys"),
            header("content-type", "application/x-amz-json-1.1"),
            header(
                "authorization",
                "AWS4-HMAC-SHA256 Credential=AKIAIOSFODNN7EXAMPLE/20260102/us-east-1/kms/aws4_request, \
                 SignedHeaders=content-type;host;x-amz-date;x-amz-target, \
                 Signature=03704c6ac1fcf5a27ca6f14f7969864491eac70bd7f97ac0c1a0592893e75b69",
            ),
        ]
    }

    fn judge(headers: &[(String, String)], body: &[u8], secret: &str, at: OffsetDateTime) -> String {
        let request = Signed { method: "POST", path: "/", query: "", headers, body };
        let outcome = Authorization::of(&request, "us-east-1", at)
            .and_then(|authorization| authorization.check(&request, secret));
        outcome.map_or_else(|e| e.kind.to_owned(), |()| "good".to_owned())
    }

    fn with(name: &str, change: impl Fn(&str) -> String) -> Vec<(String, String)> {
        let mut headers = headers();
        headers.iter_mut().filter(|(known, _)| known == name).for_each(|(_, value)| *value = change(value));
        headers
    }

    fn without(name: &str) -> Vec<(String, String)> {
        headers().into_iter().filter(|(known, _)| known != name).collect()
    }

    #[test]
    fn a_request_that_botocore_signed_is_good_and_any_change_is_not() {
        assert_eq!(judge(&headers(), b"{}", SECRET, NOW), "good");
        let bad = "InvalidSignatureException";
        assert_eq!(judge(&headers(), b"{ }", SECRET, NOW), bad);
        assert_eq!(judge(&headers(), b"{}", "another", NOW), bad);
        for name in ["host", "x-amz-target", "content-type"] {
            assert_eq!(judge(&with(name, |v| format!("{v}x")), b"{}", SECRET, NOW), bad, "{name}");
        }
        let replaced = |from: &str, to: &str| with("authorization", |v| v.replace(from, to));
        assert_eq!(judge(&replaced("us-east-1", "eu-west-1"), b"{}", SECRET, NOW), bad);
        assert_eq!(judge(&replaced("/kms/", "/s3/"), b"{}", SECRET, NOW), bad);
        assert_eq!(judge(&replaced("20260102", "20260103"), b"{}", SECRET, NOW), bad);
        assert_eq!(judge(&replaced(";x-amz-target", ""), b"{}", SECRET, NOW), bad);
        let mut hashed = headers();
        hashed.push(("x-amz-content-sha256".into(), "UNSIGNED-PAYLOAD".into()));
        assert_eq!(judge(&hashed, b"{}", SECRET, NOW), bad);
    }

    #[test]
    fn what_we_sign_is_what_botocore_signs() {
        let mut headers = headers();
        let (_, signed) = headers.pop().unwrap();
        headers.sort();
        let request = Signed { method: "POST", path: "/", query: "", headers: &headers, body: b"{}" };
        assert_eq!(authorization(&request, "us-east-1", "AKIAIOSFODNN7EXAMPLE", SECRET).0, signed);
    }

    #[test]
    fn an_answer_is_signed_for_its_request_by_who_has_its_secret() {
        let key = |change: &dyn Fn(&str) -> String, secret: &str| {
            let header = change(&headers()[4].1);
            Authorization::parse(&header).unwrap().answer_key(secret)
        };
        let as_it_is = |header: &str| header.to_owned();
        let good = key(&as_it_is, SECRET).sign(200, b"{}");
        let is_signed = |key: AnswerKey, status, body: &[u8]| key.is_signed(status, body, &good);
        assert!(is_signed(key(&as_it_is, SECRET), 200, b"{}"));
        assert!(!is_signed(key(&as_it_is, SECRET), 400, b"{}"));
        assert!(!is_signed(key(&as_it_is, SECRET), 200, b"{ }"));
        assert!(!is_signed(key(&as_it_is, "another"), 200, b"{}"));
        assert!(!is_signed(key(&|it| it.replace("Signature=0", "Signature=1"), SECRET), 200, b"{}"));
        assert!(!key(&as_it_is, SECRET).is_signed(200, b"{}", ""));
        // Whoever sees the request has no answer to it.
        assert!(!headers()[4].1.contains(&good));
    }

    #[test]
    fn clocks_may_be_five_minutes_apart() {
        let minutes = |n| NOW + Duration::minutes(n);
        for at in [minutes(-5), minutes(5)] {
            assert_eq!(judge(&headers(), b"{}", SECRET, at), "good");
        }
        for at in [minutes(-5) - Duration::SECOND, minutes(5) + Duration::SECOND] {
            assert_eq!(judge(&headers(), b"{}", SECRET, at), "InvalidSignatureException");
        }
    }

    #[test]
    fn what_is_no_signature_is_refused_by_name() {
        let incomplete = "IncompleteSignatureException";
        let missing = "MissingAuthenticationTokenException";
        assert_eq!(judge(&without("authorization"), b"{}", SECRET, NOW), missing);
        for name in ["x-amz-date", "host"] {
            assert_eq!(judge(&without(name), b"{}", SECRET, NOW), incomplete);
        }
        for value in
            ["", "Basic x", "AWS4-HMAC-SHA256", "AWS4-HMAC-SHA256 ", "AWS4-HMAC-SHA256 Credential=a/b/c"]
        {
            assert_eq!(judge(&with("authorization", |_| value.into()), b"{}", SECRET, NOW), incomplete);
        }
        for part in ["Credential", "SignedHeaders", "Signature"] {
            let headers = with("authorization", |v| v.replace(&format!("{part}="), "x="));
            assert_eq!(judge(&headers, b"{}", SECRET, NOW), incomplete);
        }
        for time in ["", "2026", "20260102T0304", "äöüäöüäöü"] {
            assert_eq!(judge(&with("x-amz-date", |_| time.into()), b"{}", SECRET, NOW), incomplete);
        }
        let mut with_token =
            with("authorization", |v| v.replace(";x-amz-target", ";x-amz-security-token;x-amz-target"));
        with_token.push(("x-amz-security-token".into(), "x".into()));
        assert_eq!(judge(&with_token, b"{}", SECRET, NOW), "UnrecognizedClientException");
    }
}
