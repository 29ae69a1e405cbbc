//! Credentials, regions and endpoints are found where users of AWS are used to put them.

use crate::aws::faults::{Answer, Faults, Seen, exception, nobody};
use crate::aws::site::Site;
use crate::common::kms_server::{self, KmsServer, Variables, environment};
use crate::common::store::{Store, said};
use crate::suite::Admin;
use serde_json::Value;
use std::fs;
use std::process::Output;

/// A KMS with a key, and a store of which nothing is known but where its configuration files lie.
struct Case {
    kms: KmsServer,
    key: String,
    store: Store,
    variables: Variables,
    keys: (String, String),
}

impl Case {
    fn new() -> Self {
        Self::with(KmsServer::start())
    }

    fn with(kms: KmsServer) -> Self {
        let root = kms.principal("root");
        let keys = (root.keys().0.to_owned(), root.keys().1.to_owned());
        let (key, variables) = (Admin::create_key(&kms.admin()), environment(&kms.url));
        let store = Store::new();
        store.configure("kms-patience = 0");
        Case { kms, key, store, variables, keys }
    }

    fn set(&mut self, name: &str, value: &str) {
        kms_server::set(&mut self.variables, name, value);
    }

    fn file(&self, name: &str, text: &str) -> String {
        let path = self.store.config().join(name);
        fs::write(&path, text).expect("write a file");
        path.display().to_string()
    }

    fn create(&self, key: &str) -> Output {
        self.store.set_environment(self.variables.clone());
        self.store.run(&["volume", "create", "--size", "1MiB", "--key", &format!("aws:{key}")])
    }

    #[track_caller]
    fn works(&self) {
        let output = self.create(&self.key);
        assert!(output.status.success(), "{}", said(&output));
    }

    /// A request reaches the KMS with the credentials of a role, which have a session token.
    #[track_caller]
    fn asks_as_role(&mut self) {
        let kms = Faults::start([], exception(400, "AccessDeniedException", "No."));
        self.set("AWS_ENDPOINT_URL_KMS", &kms.url);
        let output = self.create(&self.key);
        assert_eq!(output.status.code(), Some(5), "{}", said(&output));
        let head = kms.head().to_ascii_lowercase();
        assert!(
            head.contains("credential=asiarole/") && head.contains("x-amz-security-token: of-the-role"),
            "{head}"
        );
    }
}

/// What a server of credentials answers.
fn credentials(id: &str, secret: &str) -> String {
    format!(
        r#"{{"Code":"Success","Type":"AWS-HMAC","AccessKeyId":"{id}","SecretAccessKey":"{secret}","Token":"of-the-role",
           "LastUpdated":"2020-01-01T00:00:00Z","Expiration":"2999-01-01T00:00:00Z"}}"#
    )
}

#[test]
fn a_profile_names_the_endpoint_the_region_and_the_keys() {
    let mut case = Case::new();
    let (id, secret) = &case.keys;
    let config = case.file(
        "config",
        &format!(
            "[profile host]\nregion = us-east-1\nservices = local\n[services local]\nkms =\n  endpoint_url = \
             {}\n",
            case.kms.url
        ),
    );
    let credentials = case
        .file("credentials", &format!("[host]\naws_access_key_id={id}\naws_secret_access_key={secret}\n"));
    case.set("AWS_ENDPOINT_URL_KMS", "");
    case.set("AWS_REGION", "");
    case.set("AWS_CONFIG_FILE", &config);
    case.set("AWS_SHARED_CREDENTIALS_FILE", &credentials);
    case.set("AWS_PROFILE", "host");
    case.works();
}

#[test]
fn a_program_may_give_the_credentials() {
    let mut case = Case::new();
    let (id, secret) = &case.keys;
    let answer = format!(r#"{{"Version":1,"AccessKeyId":"{id}","SecretAccessKey":"{secret}"}}"#);
    let answer = case.file("answer", &answer);
    let config = case.file("config", &format!("[default]\ncredential_process = /bin/cat {answer}\n"));
    case.set("AWS_CONFIG_FILE", &config);
    case.works();
}

#[test]
fn a_container_s_credentials_are_asked_for() {
    let mut case = Case::new();
    let server = Faults::start([], Answer::Http(200, credentials("ASIAROLE", "secret")));
    case.set("AWS_CONTAINER_CREDENTIALS_FULL_URI", &format!("{}/credentials", server.url));
    case.asks_as_role();
    assert!(server.head().starts_with("GET /credentials HTTP/1.1\r\n"));
}

#[test]
fn an_instance_s_role_is_asked_for() {
    let mut case = Case::new();
    let answers = ["token".to_owned(), "role".to_owned(), credentials("ASIAROLE", "secret")];
    let server = Faults::start(answers.map(|text| Answer::Http(200, text)), Answer::HangUp);
    case.set("AWS_EC2_METADATA_DISABLED", "false");
    case.set("AWS_EC2_METADATA_SERVICE_ENDPOINT", &server.url);
    case.asks_as_role();
    assert!(server.head().starts_with("PUT /latest/api/token HTTP/1.1\r\n"));
}

#[test]
fn without_credentials_the_reader_is_told_what_to_do() {
    let case = Case::new();
    let output = case.create(&case.key);
    assert_eq!(output.status.code(), Some(5), "{}", said(&output));
    assert!(said(&output).contains("there are no AWS credentials: set AWS_PROFILE"), "{}", said(&output));
}

#[test]
fn without_a_region_an_alias_means_nothing() {
    let mut case = Case::new();
    case.set("AWS_REGION", "");
    let output = case.create("alias/disks");
    assert_eq!(output.status.code(), Some(2), "{}", said(&output));
    assert!(said(&output).contains("name the key by its ARN, or set AWS_REGION"), "{}", said(&output));
}

/// Nothing leaves the machine: the proxy is ours, and sees whom the SDK wants to speak to.
#[test]
fn the_arn_s_region_and_fips_decide_the_endpoint_and_the_proxy_is_used() {
    let mut case = Case::new();
    let (id, secret) = case.keys.clone();
    for name in ["AWS_ENDPOINT_URL_KMS", "NO_PROXY", "no_proxy"] {
        case.set(name, "");
    }
    case.set("AWS_ACCESS_KEY_ID", &id);
    case.set("AWS_SECRET_ACCESS_KEY", &secret);
    case.set("AWS_USE_FIPS_ENDPOINT", "true");
    let proxy = Faults::start([], Answer::Http(403, String::new()));
    for name in ["HTTPS_PROXY", "https_proxy"] {
        case.set(name, &proxy.url);
    }
    let output =
        case.create("arn:aws:kms:eu-central-1:111122223333:key/1234abcd-12ab-44cd-92ef-1234567890ab");
    let told = said(&output);
    assert_eq!(output.status.code(), Some(6), "{told}");
    assert!(told.contains("could not reach https://kms-fips.eu-central-1.amazonaws.com: "), "{told}");
    let head = proxy.head();
    assert!(head.starts_with("CONNECT kms-fips.eu-central-1.amazonaws.com:443 HTTP/1.1\r\n"), "{head}");
}

#[test]
fn a_configuration_that_makes_no_sense_is_not_tried_again() {
    let mut case = Case::new();
    let (id, secret) = case.keys.clone();
    case.store.configure("kms-patience = 600");
    case.set("AWS_ACCESS_KEY_ID", &id);
    case.set("AWS_SECRET_ACCESS_KEY", &secret);
    case.set("AWS_USE_FIPS_ENDPOINT", "true");
    let output = case.create(&case.key);
    assert_eq!(output.status.code(), Some(2), "{}", said(&output));
    assert!(said(&output).contains("FIPS and custom endpoint are not supported"), "{}", said(&output));
}

/// The proxy is ours, and would see a request that was sent all the same.
#[test]
fn nothing_is_sent_to_another_machine_in_the_clear() {
    let mut case = Case::new();
    let (id, secret) = case.keys.clone();
    let proxy = Faults::start([], Answer::HangUp);
    for name in ["NO_PROXY", "no_proxy"] {
        case.set(name, "");
    }
    for name in ["HTTP_PROXY", "http_proxy"] {
        case.set(name, &proxy.url);
    }
    let refused = |case: &Case, what: &str| {
        let output = case.create(&case.key);
        assert_eq!(output.status.code(), Some(2), "{}", said(&output));
        assert!(said(&output).contains(&format!("{what} is another machine")), "{}", said(&output));
        assert!(proxy.seen.try_recv().is_err(), "{what} was spoken to");
    };
    // Whoever is to give the credentials has the secret that they are got with.
    let token = case.file("token", "a token of an identity provider");
    case.set("AWS_WEB_IDENTITY_TOKEN_FILE", &token);
    case.set("AWS_ROLE_ARN", "arn:aws:iam::000000000000:role/host");
    case.set("AWS_ENDPOINT_URL_STS", "http://sts.example");
    refused(&case, "http://sts.example");
    case.set("AWS_ACCESS_KEY_ID", &id);
    case.set("AWS_SECRET_ACCESS_KEY", &secret);
    // 192.0.2.0/24 is for documentation.
    for place in ["http://kms.example:8600", "http://192.0.2.1", "http://[2001:db8::1]:8600"] {
        case.set("AWS_ENDPOINT_URL_KMS", place);
        refused(&case, place);
    }
    case.set("AWS_ENDPOINT_URL_KMS", "");
    case.set("AWS_ENDPOINT_URL", "http://aws.example");
    refused(&case, "http://aws.example");
}

#[test]
fn a_kms_behind_tls_is_believed_by_the_certificates_that_the_environment_names() {
    let files = tempfile::tempdir().expect("make a temporary folder");
    let file = |name: &str, text: &str| {
        let path = files.path().join(name);
        fs::write(&path, text).expect("write a file");
        path.display().to_string()
    };
    let mut case = Case::with(KmsServer::start_tls(files.path()));
    let certificate = files.path().join("kms.pem").display().to_string();
    let (id, secret) = case.keys.clone();
    case.set("AWS_ACCESS_KEY_ID", &id);
    case.set("AWS_SECRET_ACCESS_KEY", &secret);
    let stranger = rcgen::generate_simple_self_signed(vec!["127.0.0.1".into()]).expect("make a certificate");
    let stranger = file("stranger.pem", &stranger.cert.pem());
    for (name, trusted) in [("AWS_CA_BUNDLE", &certificate), ("SSL_CERT_FILE", &certificate)] {
        case.set(name, &stranger);
        let output = case.create(&case.key);
        assert_eq!(output.status.code(), Some(6), "{}", said(&output));
        assert!(said(&output).contains("invalid peer certificate"), "{}", said(&output));
        case.set(name, trusted);
        case.works();
        case.set(name, "");
    }
    for (text, why) in [("", "there are no certificates in it"), (NO_CERTIFICATE, "AWS_CA_BUNDLE: ")] {
        case.set("AWS_CA_BUNDLE", &file("bad.pem", text));
        let output = case.create(&case.key);
        assert_eq!(output.status.code(), Some(2), "{}", said(&output));
        assert!(said(&output).contains(why), "{}", said(&output));
    }
}

/// PEM, but no certificate.
const NO_CERTIFICATE: &str = "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n";

/// A record in the store can name a key of anybody's; this host's data keys are none of that KMS's affair.
#[test]
fn a_kms_is_asked_for_a_data_key_only_by_a_key_that_the_settings_allow() {
    let site = Site::new("kms-patience = 0\n");
    let key = site.place.key();
    let id = key.rsplit_once('/').expect("an ARN").1;
    let alias = site.kms.admin().create_alias("alias/volumes", id);
    alias.expect("make an alias");
    let kms = Faults::start([], Answer::Pass(site.kms.url.clone()));
    site.move_to(&kms.url);
    let targets = |kms: &Faults| -> Vec<String> {
        let heads = kms.seen.try_iter().map(|seen| match seen {
            Seen::Request(head) => head.to_ascii_lowercase(),
            Seen::GaveUp => panic!("the client gave up"),
        });
        let target = |head: String| {
            head.split_once("trentservice.").map(|(_, rest)| rest.lines().next().map(str::to_owned))
        };
        heads.map(|head| target(head).flatten().expect("a target")).collect()
    };
    let place = format!("{}*", key.strip_suffix(id).expect("it ends with the id"));
    for (allowed, asked) in [
        ("aws", &["decrypt"][..]),
        (&key, &["decrypt"]),
        (&format!("aws:{key}"), &["decrypt"]),
        (&place, &["decrypt"]),
        ("aws:alias/volumes", &["describekey", "decrypt"]),
        (&format!("aws:{id}"), &["describekey", "decrypt"]),
    ] {
        // The KMS of this test is where the embedded one would be.
        let allowed = if allowed.starts_with("arn:") { format!("aws:{allowed}") } else { allowed.to_owned() };
        site.place.store.configure(&format!("kms-patience = 0\nkms-keys = ['embedded', {allowed:?}]\n"));
        site.place.attach(&[]).end();
        assert_eq!(targets(&kms), asked, "{allowed}");
    }
    let other = "aws:arn:aws:kms:us-east-1:111122223333:key/*";
    site.place.store.configure(&format!("kms-patience = 0\nkms-keys = ['embedded', {other:?}]\n"));
    let refusal = site.place.refuse(5, &[]);
    assert!(refusal.contains("kms-keys") && refusal.contains(&key), "{refusal}");
    for command in [
        &["volume", "create", "--size", "1MiB", "--key", &format!("aws:{key}")][..],
        &["volume", "rewrap", "t", "--key", "alias/aws/ebs"],
        &["volume", "rekey", "t"],
        &["volume", "show", "t", "--check-key"],
    ] {
        let output = site.place.store.run(command);
        assert_eq!(output.status.code(), Some(5), "{}", said(&output));
    }
    assert_eq!(targets(&kms), [] as [String; 0], "nobody was asked anything");
    // An alias that there is not allows nothing.
    site.place.store.configure("kms-patience = 0\nkms-keys = ['aws:alias/none']\n");
    site.place.refuse(5, &[]);
    assert_eq!(targets(&kms), ["describekey"]);
}

/// Where the settings give the embedded KMS the place of an account at AWS: an ARN is whose key it is.
#[test]
fn an_arn_of_ones_own_account_is_aws_s_unless_the_embedded_kms_has_the_key() {
    let store = Store::new();
    let place = "region = 'eu-west-1'\naccount = '111122223333'\nkms-patience = 0\n";
    store.configure(place);
    // Who asks AWS has no credentials, and so hears that before anything else.
    store.set_environment(environment(&nobody()));
    let asked_aws = "there are no AWS credentials";
    let made: Value =
        serde_json::from_str(&store.ok(&["key", "create", "--alias", "alias/x", "--json"])).unwrap();
    let own = made["arn"].as_str().unwrap().to_owned();
    assert!(own.starts_with("arn:aws:kms:eu-west-1:111122223333:key/"), "{own}");
    let theirs = "arn:aws:kms:eu-west-1:111122223333:key/1234abcd-12ab-44cd-92ef-1234567890ab";
    let alias = "arn:aws:kms:eu-west-1:111122223333:alias/x";
    let create = |key: &str| store.run(&["volume", "create", "--size", "1MiB", "--key", key]);
    let made = create(&own);
    assert!(made.status.success(), "{}", said(&made));
    for (key, code, words) in [
        (theirs, 5, asked_aws),
        (&*format!("aws:{own}"), 5, asked_aws),
        (&format!("embedded:{theirs}"), 3, "does not exist"),
        (alias, 2, "write \"aws:"),
    ] {
        let output = create(key);
        assert_eq!(output.status.code(), Some(code), "{key}: {}", said(&output));
        assert!(said(&output).contains(words), "{key}: {}", said(&output));
    }
    // In the list of keys that may be asked, too.
    store.configure(&format!("{place}kms-keys = ['{theirs}', '{own}']"));
    assert!(create(&own).status.success());
    assert!(said(&create(theirs)).contains(asked_aws));
    store.configure(&format!("{place}kms-keys = ['{theirs}']"));
    for key in [&own, "alias/x"] {
        let output = create(key);
        assert_eq!(output.status.code(), Some(5), "{key}: {}", said(&output));
        assert!(said(&output).contains("is not one of the kms-keys"), "{key}: {}", said(&output));
    }
}
