"""Clients of the KMS server that go on while something happens to it. Started by tests/kms/server.rs with the server's URL
and an access key in the environment, and one of the words below.
"""
import base64
import os
import sys
import threading
import time

import boto3
import botocore.config
from botocore.exceptions import BotoCoreError, ClientError


# Seconds that nothing here takes, however slow the machine is.
LIMIT = float(os.environ["SEALBLK_TEST_LIMIT"])


def client():
    config = botocore.config.Config(retries={"total_max_attempts": 1}, connect_timeout=LIMIT, read_timeout=LIMIT)
    return boto3.client("kms", endpoint_url=os.environ["KMS_URL"], region_name="us-east-1", config=config,
                        verify=os.environ.get("KMS_CA"), aws_access_key_id=os.environ["ROOT_KEY"],
                        aws_secret_access_key=os.environ["ROOT_SECRET"])


def say(*words):
    print(*words, flush=True)


def once():
    """One request, and whether it was answered."""
    try:
        client().generate_random(NumberOfBytes=1)
        say("answered")
    except BotoCoreError as e:
        say("refused", type(e).__name__)


def hold():
    """A data key, told to whoever started this, while the connection stays open until a line comes."""
    kms = client()
    key = kms.create_key()["KeyMetadata"]["KeyId"]
    made = kms.generate_data_key(KeyId=key, NumberOfBytes=64)
    opened = kms.decrypt(CiphertextBlob=made["CiphertextBlob"])
    assert opened["Plaintext"] == made["Plaintext"]
    say(base64.b64encode(made["Plaintext"]).decode())
    sys.stdin.readline()


def decrypt_in_token():
    """Decrypts by a key in a token, each time that a line comes, and says what came of it."""
    kms = client()
    store = kms.create_custom_key_store(CustomKeyStoreName="one", CloudHsmClusterId="cluster-of-token-one",
                                        TrustAnchorCertificate="-", KeyStorePassword=os.environ["PIN_ONE"])
    store = store["CustomKeyStoreId"]
    kms.connect_custom_key_store(CustomKeyStoreId=store)
    key = kms.create_key(Origin="AWS_CLOUDHSM", CustomKeyStoreId=store)["KeyMetadata"]["Arn"]
    blob = kms.encrypt(KeyId=key, Plaintext=b"x", EncryptionContext={"a": "b"})["CiphertextBlob"]
    say("ready")
    for _ in sys.stdin:
        try:
            assert kms.decrypt(CiphertextBlob=blob, EncryptionContext={"a": "b"})["Plaintext"] == b"x"
            say("opened")
        except ClientError as e:
            say("refused", e.response["Error"]["Code"], e.response["Error"].get("Message", ""))


def mutate():
    """Changes as fast as they are answered; each is told once it is. Ends with the server."""
    kms = client()
    try:
        for n in range(10**6):
            key = kms.create_key(Description=str(n))["KeyMetadata"]["KeyId"]
            say("key", key)
            kms.create_alias(AliasName="alias/" + key, TargetKeyId=key)
            say("alias", key)
            kms.disable_key(KeyId=key)
            say("disabled", key)
    except (BotoCoreError, ClientError) as e:
        say("ended", type(e).__name__)


def race():
    """One client disables and enables, others decrypt: after an answer to Disable, no Decrypt that begins succeeds."""
    admin = client()
    key = admin.create_key()["KeyMetadata"]["KeyId"]
    blob = admin.encrypt(KeyId=key, Plaintext=b"x")["CiphertextBlob"]
    over, news, times = threading.Event(), threading.Condition(), []

    def decrypt():
        kms = client()
        while not over.is_set():
            begun = time.monotonic()
            try:
                kms.decrypt(CiphertextBlob=blob)
                done = True
            except ClientError as e:
                assert e.response["Error"]["Code"] == "DisabledException", e
                done = False
            with news:
                times.append((begun, time.monotonic(), done))
                news.notify_all()

    def wait_for(since, done):
        """Three attempts that began since then and came to that."""
        with news:
            enough = lambda: sum(t[0] > since and t[2] == done for t in times) >= 3
            assert news.wait_for(enough, timeout=LIMIT), f"no three of {len(times)} came to {done}"

    threads = [threading.Thread(target=decrypt) for _ in range(3)]
    for thread in threads:
        thread.start()
    off = []
    for _ in range(15):
        admin.disable_key(KeyId=key)
        disabled = time.monotonic()
        wait_for(disabled, False)
        off.append((disabled, time.monotonic()))
        admin.enable_key(KeyId=key)
        wait_for(time.monotonic(), True)
    over.set()
    for thread in threads:
        thread.join()
    wrong = [(t, o) for t in times if t[2] for o in off if o[0] < t[0] and t[1] < o[1]]
    assert not wrong, wrong[:3]
    say("tried", sum(t[2] for t in times), sum(not t[2] for t in times))


def denied():
    """Requests that are refused, with as many words of the sender's as fit into them."""
    kms, code = client(), None
    for n in range(300):
        try:
            words = {f"needle-{m}": "needle" * 60 for m in range(8)}
            kms.create_grant(KeyId=os.environ["KEY"], GranteePrincipal="arn:aws:iam::000000000000:root",
                             Operations=["Decrypt"], Constraints={"EncryptionContextSubset": words})
        except ClientError as e:
            assert e.response["Error"]["Code"] == "AccessDeniedException", e
    try:
        kms.describe_key(KeyId="needle" * 300)
    except ClientError as e:
        code = e.response["Error"]["Code"]
    say("denied", code)


{"once": once, "decrypt_in_token": decrypt_in_token, "denied": denied, "hold": hold, "mutate": mutate, "race": race}[sys.argv[1]]()
