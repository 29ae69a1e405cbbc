//! The Authorization header of a request to the KMS, and what it signs.

use super::input::Input;
use hmac::{Hmac, KeyInit, Mac};
use sealblk::kms::server::sigv4::{Authorization, Signed};
use sha2::{Digest, Sha256};
use time::OffsetDateTime;
use time::macros::datetime;

const NOW: OffsetDateTime = datetime!(2026-01-02 03:04:05 UTC);
const TIME: &str = "20260102T030405Z";
const SCOPE: &str = "20260102/us-east-1/kms/aws4_request";
const SECRET: &str = "wJalrXUtnFEMI/K7MDENG+bPxRfiCYEXAMPLEKEY";

/// Any headers; or a request that is signed by the rules and then changed.
pub fn run(data: &[u8]) {
    let mut input = Input::new(data);
    if input.coin() { any(input.rest()) } else { signed(&mut input) }
}

/// Lines of `name:value`, and behind an empty one the body.
fn any(data: &[u8]) {
    let text = String::from_utf8_lossy(data);
    let (head, body) = text.split_once("\n\n").unwrap_or((&text, ""));
    let headers: Vec<(String, String)> = head
        .lines()
        .filter_map(|line| line.split_once(':'))
        .map(|(name, value)| (name.to_ascii_lowercase(), value.trim().to_owned()))
        .collect();
    let request = Signed { method: "POST", path: "/", query: "", headers: &headers, body: body.as_bytes() };
    match Authorization::of(&request, "us-east-1", NOW) {
        Ok(authorization) => {
            // Nobody knows the secret, so nobody can have signed.
            assert!(authorization.check(&request, SECRET).is_err());
            assert!(request.header("host").is_some() && request.header("x-amz-date").is_some());
        }
        Err(e) => assert!(e.kind.ends_with("Exception") && e.message.is_some()),
    }
}

fn signed(input: &mut Input) {
    let mut headers = vec![("host".to_owned(), "kms".to_owned()), ("x-amz-date".to_owned(), TIME.to_owned())];
    for _ in 0..input.u8() % 4 {
        // Further headers, doubles among them; values without blanks, which mean little.
        let name = format!("x-{}", char::from(b'a' + input.u8() % 8));
        let value: String = input.bytes(6).iter().map(|b| char::from(b'!' + b % 90)).collect();
        headers.push((name, value));
    }
    let (what, at, change) = (input.u8(), input.u8(), input.u8() & 0x1f);
    let mut body = input.rest().to_vec();
    let mut names: Vec<&str> = headers.iter().map(|(name, _)| name.as_str()).collect();
    names.sort_unstable();
    names.dedup();
    let authorization = authorization(&headers, &names.join(";"), &body);
    headers.push(("authorization".to_owned(), authorization));
    let before = (headers.clone(), body.clone());
    // One character of one value, or one byte of the body; the signature's own header is among them.
    let place = usize::from(what) % (headers.len() + 1);
    match headers.get_mut(place) {
        Some((_, value)) if !value.is_empty() => {
            let at = usize::from(at) % value.len();
            let mut bytes = std::mem::take(value).into_bytes();
            bytes[at] ^= change;
            *value = String::from_utf8_lossy(&bytes).trim().to_owned();
        }
        Some(_) => {}
        None => {
            if let Some(byte) = body.get_mut(usize::from(at)) {
                *byte ^= change;
            }
        }
    }
    let request = Signed { method: "POST", path: "/", query: "", headers: &headers, body: &body };
    let parsed = Authorization::of(&request, "us-east-1", NOW);
    let accepted = parsed.and_then(|authorization| {
        authorization.check(&request, SECRET)?;
        Ok(authorization.access_key)
    });
    let unchanged = before == (headers, body);
    match accepted {
        Ok(key) if unchanged => assert_eq!(key, "AKIAIOSFODNN7EXAMPLE"),
        // The key's id is not signed: it says whose secret it is. What the header has beside its
        // three parts is passed over.
        Ok(_) => assert_eq!(place, before.0.len() - 1, "a request was changed and accepted"),
        Err(e) => assert!(!unchanged, "a signed request was refused: {e:?}"),
    }
}

/// By the rules of Signature Version 4, written down once more.
fn authorization(headers: &[(String, String)], names: &str, body: &[u8]) -> String {
    let mut canonical = "POST\n/\n\n".to_owned();
    for name in names.split(';') {
        let values: Vec<&str> = headers.iter().filter(|(n, _)| n == name).map(|(_, v)| v.as_str()).collect();
        canonical += &format!("{name}:{}\n", values.join(","));
    }
    canonical += &format!("\n{names}\n{}", hex::encode(Sha256::digest(body)));
    let to_sign = format!("AWS4-HMAC-SHA256\n{TIME}\n{SCOPE}\n{}", hex::encode(Sha256::digest(canonical)));
    let start = mac(format!("AWS4{SECRET}").as_bytes(), b"20260102");
    let key = [&b"us-east-1"[..], b"kms", b"aws4_request"].iter().fold(start, |key, part| mac(&key, part));
    format!(
        "AWS4-HMAC-SHA256 Credential=AKIAIOSFODNN7EXAMPLE/{SCOPE}, SignedHeaders={names}, Signature={}",
        hex::encode(mac(&key, to_sign.as_bytes()))
    )
}

fn mac(key: &[u8], data: &[u8]) -> [u8; 32] {
    let mut mac = <Hmac<Sha256> as KeyInit>::new_from_slice(key).expect("HMAC takes a key of any length");
    mac.update(data);
    mac.finalize().into_bytes().into()
}
