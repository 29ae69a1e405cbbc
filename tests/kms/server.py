"""What boto3 sees of the KMS server: every operation, in good states and bad.

Started by tests/kms/server.rs with the server's URL, and the access keys of the root principal and of a principal
"host" that may do nothing, in the environment.
"""
import datetime
import http.client
import os
import socket
import sys
import unittest
from urllib.parse import urlsplit

import boto3
import botocore.auth
import botocore.awsrequest
import botocore.config
import botocore.credentials
from botocore.exceptions import ClientError

URL = os.environ["KMS_URL"]
# Seconds that nothing here takes, however slow the machine is.
LIMIT = float(os.environ["SEALBLK_TEST_LIMIT"])
ROOT = (os.environ["ROOT_KEY"], os.environ["ROOT_SECRET"])
HOST = (os.environ["HOST_KEY"], os.environ["HOST_SECRET"])
HOST_ARN = "arn:aws:iam::000000000000:user/host"
ROOT_ARN = "arn:aws:iam::000000000000:root"
ABSENT = "arn:aws:kms:us-east-1:000000000000:key/1234abcd-12ab-44cd-92ef-1234567890ab"
CONTEXT = {"aws:ebs:id": "vol-1"}


def client(keys, region="us-east-1", token=None):
    # What is wrong on purpose must reach the server: neither parameter checks nor retries.
    config = botocore.config.Config(parameter_validation=False, retries={"total_max_attempts": 1},
                                    connect_timeout=LIMIT, read_timeout=LIMIT)
    return boto3.client("kms", endpoint_url=URL, region_name=region, config=config, aws_access_key_id=keys[0],
                        aws_secret_access_key=keys[1], aws_session_token=token)


kms = client(ROOT)
host = client(HOST)


def post(body=b"{}", target="TrentService.ListKeys", keys=ROOT, headers=(), at=None, service="kms",
         region="us-east-1", change=None, method="POST", path="/"):
    """A request signed by botocore, then changed; its status and the answer."""
    request = botocore.awsrequest.AWSRequest(method, URL + path, data=body, headers={
        "Host": urlsplit(URL).netloc, "Content-Type": "application/x-amz-json-1.1", "X-Amz-Target": target,
        **dict(headers)})
    signer = botocore.auth.SigV4Auth(botocore.credentials.Credentials(*keys), service, region)
    real = botocore.auth.get_current_datetime
    if at:
        botocore.auth.get_current_datetime = lambda *a, **k: at
    try:
        signer.add_auth(request)
    finally:
        botocore.auth.get_current_datetime = real
    send = dict(request.headers.items())
    if change:
        body = change(send, body)
    connection = http.client.HTTPConnection(urlsplit(URL).netloc, timeout=LIMIT)
    try:
        connection.request(method, path, body=body, headers=send)
        answer = connection.getresponse()
        return answer.status, answer.read().decode()
    finally:
        connection.close()


class Case(unittest.TestCase):
    def fails(self, name, message, call, *args, **kwargs):
        with self.assertRaises(ClientError) as raised:
            call(*args, **kwargs)
        error = raised.exception.response["Error"]
        self.assertEqual(error["Code"], name, error)
        if message is not None:
            self.assertIn(message, error.get("Message", ""))
        return error

    def key(self, **kwargs):
        return kms.create_key(**kwargs)["KeyMetadata"]["Arn"]


class Keys(Case):
    def test_life_of_a_key(self):
        made = kms.create_key(Description="d", Tags=[{"TagKey": "t", "TagValue": "v"}])["KeyMetadata"]
        arn = made["Arn"]
        self.assertEqual((made["KeyState"], made["Enabled"], made["Origin"]), ("Enabled", True, "AWS_KMS"))
        self.assertIsInstance(made["CreationDate"], datetime.datetime)
        self.assertEqual(arn, f"arn:aws:kms:us-east-1:000000000000:key/{made['KeyId']}")
        state = lambda: kms.describe_key(KeyId=made["KeyId"])["KeyMetadata"]["KeyState"]
        kms.update_key_description(KeyId=arn, Description="new")
        self.assertEqual(kms.describe_key(KeyId=arn)["KeyMetadata"]["Description"], "new")
        self.fails("KMSInvalidStateException", f"{arn} is not pending deletion.", kms.cancel_key_deletion, KeyId=arn)
        kms.disable_key(KeyId=arn)
        self.assertEqual(state(), "Disabled")
        kms.enable_key(KeyId=arn)
        self.assertEqual(state(), "Enabled")
        dying = kms.schedule_key_deletion(KeyId=made["KeyId"], PendingWindowInDays=7)
        self.assertEqual((dying["KeyId"], dying["KeyState"], dying["PendingWindowInDays"]), (arn, "PendingDeletion", 7))
        pending = f"{arn} is pending deletion."
        for call, arguments in [
                (kms.enable_key, {}), (kms.disable_key, {}), (kms.schedule_key_deletion, {}),
                (kms.update_key_description, {"Description": "x"}),
                (kms.tag_resource, {"Tags": [{"TagKey": "a", "TagValue": "b"}]}),
                (kms.enable_key_rotation, {}), (kms.rotate_key_on_demand, {}),
                (kms.encrypt, {"Plaintext": b"x"}), (kms.generate_data_key, {"NumberOfBytes": 64}),
                (kms.generate_data_key_without_plaintext, {"NumberOfBytes": 64}),
                (kms.create_grant, {"GranteePrincipal": HOST_ARN, "Operations": ["Decrypt"]})]:
            self.fails("KMSInvalidStateException", pending, call, KeyId=arn, **arguments)
        self.fails("KMSInvalidStateException", pending, kms.create_alias, AliasName="alias/dying", TargetKeyId=arn)
        self.assertIn("DeletionDate", kms.describe_key(KeyId=arn)["KeyMetadata"])
        kms.get_key_policy(KeyId=arn)
        self.assertEqual(kms.cancel_key_deletion(KeyId=arn)["KeyId"], arn)
        self.assertEqual(state(), "Disabled")

    def test_disabled(self):
        arn = self.key()
        blob = kms.encrypt(KeyId=arn, Plaintext=b"x")["CiphertextBlob"]
        kms.disable_key(KeyId=arn)
        for call, arguments in [
                (kms.encrypt, {"KeyId": arn, "Plaintext": b"x"}), (kms.decrypt, {"CiphertextBlob": blob}),
                (kms.generate_data_key, {"KeyId": arn, "KeySpec": "AES_256"}),
                (kms.re_encrypt, {"CiphertextBlob": blob, "DestinationKeyId": arn}),
                (kms.enable_key_rotation, {"KeyId": arn}), (kms.rotate_key_on_demand, {"KeyId": arn}),
                (kms.create_grant, {"KeyId": arn, "GranteePrincipal": HOST_ARN, "Operations": ["Decrypt"]})]:
            self.fails("DisabledException", f"{arn} is disabled.", call, **arguments)
        kms.enable_key(KeyId=arn)
        self.assertEqual(kms.decrypt(CiphertextBlob=blob)["Plaintext"], b"x")

    def test_names_of_nothing(self):
        self.fails("NotFoundException", f"Key '{ABSENT}' does not exist", kms.describe_key, KeyId=ABSENT)
        self.fails("NotFoundException", "Invalid keyId 'x'", kms.describe_key, KeyId="x")
        self.fails("NotFoundException", "Invalid arn eu-west-1", kms.describe_key,
                   KeyId=ABSENT.replace("us-east-1", "eu-west-1"))
        self.fails("NotFoundException", "alias/nothing is not found.", kms.describe_key, KeyId="alias/nothing")
        self.fails("ValidationException", "Value null at 'keyId'", kms.describe_key)
        self.fails("SerializationException", None, kms.describe_key, KeyId=7)

    def test_create_refuses(self):
        for arguments, name in [
                ({"KeySpec": "RSA_2048"}, "ValidationException"), ({"KeyUsage": "SIGN_VERIFY"}, "ValidationException"),
                ({"Origin": "AWS_CLOUDHSM"}, "ValidationException"),
                ({"Description": "x" * 8193}, "ValidationException"), ({"Policy": "{"}, "MalformedPolicyDocumentException"),
                ({"Tags": [{"TagKey": "aws:x", "TagValue": ""}]}, "TagException")]:
            self.fails(name, None, kms.create_key, **arguments)
        arn = self.key()
        for days in (6, 31, -1):
            self.fails("ValidationException", f"Value '{days}' at 'pendingWindowInDays'", kms.schedule_key_deletion,
                       KeyId=arn, PendingWindowInDays=days)

    def test_lists_come_in_pieces(self):
        made = {self.key() for _ in range(5)}
        seen, marker = [], {}
        while True:
            page = kms.list_keys(Limit=2, **marker)
            self.assertLessEqual(len(page["Keys"]), 2)
            seen += [k["KeyArn"] for k in page["Keys"]]
            if not page["Truncated"]:
                self.assertNotIn("NextMarker", page)
                break
            marker = {"Marker": page["NextMarker"]}
        self.assertEqual(len(seen), len(set(seen)))
        self.assertLessEqual(made, set(seen))
        paginated = kms.get_paginator("list_keys").paginate(PaginationConfig={"PageSize": 3})
        self.assertLessEqual(made, {k["KeyArn"] for page in paginated for k in page["Keys"]})
        for limit in (0, 1001, -1, 1 << 40):
            self.fails("ValidationException", "at 'limit'", kms.list_keys, Limit=limit)
        self.fails("InvalidMarkerException", None, kms.list_keys, Marker="x")

    def test_aliases(self):
        one, two = self.key(), self.key()
        kms.create_alias(AliasName="alias/wire", TargetKeyId=one)
        self.fails("AlreadyExistsException", "alias/wire already exists", kms.create_alias, AliasName="alias/wire",
                   TargetKeyId=two)
        self.assertEqual(kms.describe_key(KeyId="alias/wire")["KeyMetadata"]["Arn"], one)
        kms.update_alias(AliasName="alias/wire", TargetKeyId=two)
        listed = kms.list_aliases(KeyId=two)["Aliases"]
        self.assertEqual([(a["AliasName"], a["TargetKeyId"]) for a in listed], [("alias/wire", two.split("/")[1])])
        self.assertEqual(kms.list_aliases(KeyId=one)["Aliases"], [])
        self.fails("ValidationException", 'Alias must start with the prefix "alias/"', kms.create_alias, AliasName="x",
                   TargetKeyId=one)
        self.fails("InvalidAliasNameException", None, kms.create_alias, AliasName="alias/aws/x", TargetKeyId=one)
        self.fails("ValidationException", None, kms.create_alias, AliasName="alias/x", TargetKeyId="alias/wire")
        kms.delete_alias(AliasName="alias/wire")
        self.fails("NotFoundException", None, kms.delete_alias, AliasName="alias/wire")


class Data(Case):
    def test_encrypt_and_decrypt(self):
        arn = self.key()
        sealed = kms.encrypt(KeyId=arn, Plaintext=b"secret", EncryptionContext=CONTEXT)
        self.assertEqual((sealed["KeyId"], sealed["EncryptionAlgorithm"]), (arn, "SYMMETRIC_DEFAULT"))
        blob = sealed["CiphertextBlob"]
        for key in ({}, {"KeyId": arn}, {"KeyId": arn.split("/")[1]}):
            opened = kms.decrypt(CiphertextBlob=blob, EncryptionContext=CONTEXT, **key)
            self.assertEqual((opened["Plaintext"], opened["KeyId"]), (b"secret", arn))
            self.assertEqual(opened["KeyMaterialId"],
                             kms.describe_key(KeyId=arn)["KeyMetadata"]["CurrentKeyMaterialId"])
        for wrong in ({}, {"aws:ebs:id": "vol-2"}, {"AWS:ebs:id": "vol-1"}, {**CONTEXT, "a": "b"}):
            error = self.fails("InvalidCiphertextException", None, kms.decrypt, CiphertextBlob=blob,
                               EncryptionContext=wrong)
            self.assertEqual(error.get("Message", ""), "")
        self.fails("InvalidCiphertextException", None, kms.decrypt, CiphertextBlob=b"garbage")
        self.fails("InvalidCiphertextException", None, kms.decrypt, CiphertextBlob=blob[:-1] + bytes([blob[-1] ^ 1]),
                   EncryptionContext=CONTEXT)
        self.fails("IncorrectKeyException", "does not identify a CMK", kms.decrypt, CiphertextBlob=blob,
                   KeyId=self.key(), EncryptionContext=CONTEXT)
        unknown = blob[:5] + b"\1" * 16 + blob[21:]
        self.fails("AccessDeniedException", "The ciphertext refers to a customer master key that does not exist",
                   kms.decrypt, CiphertextBlob=unknown)

    def test_lengths(self):
        arn = self.key()
        for plaintext, name in ((b"", "ValidationException"), (b"x" * 4097, "ValidationException")):
            error = self.fails(name, "at 'plaintext'", kms.encrypt, KeyId=arn, Plaintext=plaintext)
            self.assertNotIn("xxxx", error["Message"])
        blob = kms.encrypt(KeyId=arn, Plaintext=b"x" * 4096)["CiphertextBlob"]
        self.assertEqual(kms.decrypt(CiphertextBlob=blob)["Plaintext"], b"x" * 4096)
        for blob in (b"", b"x" * 6145):
            self.fails("ValidationException", "at 'ciphertextBlob'", kms.decrypt, CiphertextBlob=blob)
        self.fails("ValidationException", "Value '0' at 'numberOfBytes' failed to satisfy constraint: Member must have "
                   "value greater than or equal to 1", kms.generate_data_key, KeyId=arn, NumberOfBytes=0)
        for length in (-1, 1025, 1 << 40):
            self.fails("ValidationException", f"Value '{length}'", kms.generate_random, NumberOfBytes=length)
        self.fails("ValidationException", None, kms.generate_random)
        self.assertEqual(len(kms.generate_random(NumberOfBytes=1024)["Plaintext"]), 1024)

    def test_data_keys(self):
        arn = self.key()
        for arguments, length in (({"NumberOfBytes": 64}, 64), ({"KeySpec": "AES_256"}, 32), ({"KeySpec": "AES_128"}, 16)):
            made = kms.generate_data_key(KeyId=arn, EncryptionContext=CONTEXT, **arguments)
            self.assertEqual(len(made["Plaintext"]), length)
            opened = kms.decrypt(CiphertextBlob=made["CiphertextBlob"], EncryptionContext=CONTEXT)
            self.assertEqual(opened["Plaintext"], made["Plaintext"])
        made = kms.generate_data_key_without_plaintext(KeyId=arn, NumberOfBytes=64)
        self.assertNotIn("Plaintext", made)
        self.assertEqual(len(made["CiphertextBlob"]), 141)
        for arguments in ({}, {"NumberOfBytes": 64, "KeySpec": "AES_256"}, {"KeySpec": "AES_512"}):
            self.fails("ValidationException", None, kms.generate_data_key, KeyId=arn, **arguments)

    def test_re_encrypt(self):
        one, two = self.key(), self.key()
        blob = kms.encrypt(KeyId=one, Plaintext=b"x", EncryptionContext=CONTEXT)["CiphertextBlob"]
        arguments = {"CiphertextBlob": blob, "SourceEncryptionContext": CONTEXT, "DestinationKeyId": two,
                     "DestinationEncryptionContext": {"to": "y"}}
        done = kms.re_encrypt(**arguments)
        self.assertEqual((done["SourceKeyId"], done["KeyId"]), (one, two))
        opened = kms.decrypt(CiphertextBlob=done["CiphertextBlob"], EncryptionContext={"to": "y"})
        self.assertEqual(opened["Plaintext"], b"x")
        self.fails("IncorrectKeyException", None, kms.re_encrypt, SourceKeyId=two, **arguments)
        self.fails("InvalidCiphertextException", None, kms.re_encrypt,
                   **{**arguments, "SourceEncryptionContext": {}})

    def test_dry_run(self):
        arn = self.key()
        blob = kms.encrypt(KeyId=arn, Plaintext=b"x")["CiphertextBlob"]
        for call, arguments in [
                (kms.encrypt, {"KeyId": arn, "Plaintext": b"x"}), (kms.decrypt, {"CiphertextBlob": blob}),
                (kms.generate_data_key, {"KeyId": arn, "NumberOfBytes": 1}),
                (kms.generate_data_key_without_plaintext, {"KeyId": arn, "NumberOfBytes": 1}),
                (kms.re_encrypt, {"CiphertextBlob": blob, "DestinationKeyId": arn}),
                (kms.create_grant, {"KeyId": arn, "GranteePrincipal": HOST_ARN, "Operations": ["Decrypt"]})]:
            self.fails("DryRunOperationException",
                       "The request would have succeeded, but the DryRun option is set.", call, DryRun=True, **arguments)
        self.assertEqual(kms.list_grants(KeyId=arn)["Grants"], [])
        self.fails("InvalidCiphertextException", None, kms.decrypt, CiphertextBlob=b"x", DryRun=True)


class Notes(Case):
    def test_rotation(self):
        arn = self.key()
        blob = kms.encrypt(KeyId=arn, Plaintext=b"old")["CiphertextBlob"]
        self.assertFalse(kms.get_key_rotation_status(KeyId=arn)["KeyRotationEnabled"])
        kms.enable_key_rotation(KeyId=arn)
        self.assertEqual(kms.get_key_rotation_status(KeyId=arn)["RotationPeriodInDays"], 365)
        kms.enable_key_rotation(KeyId=arn, RotationPeriodInDays=90)
        status = kms.get_key_rotation_status(KeyId=arn)
        self.assertEqual((status["KeyRotationEnabled"], status["RotationPeriodInDays"]), (True, 90))
        self.assertIn("NextRotationDate", status)
        for days in (89, 2561, -1):
            self.fails("ValidationException", f"Value '{days}' at 'rotationPeriodInDays'", kms.enable_key_rotation,
                       KeyId=arn, RotationPeriodInDays=days)
        kms.disable_key_rotation(KeyId=arn)
        self.assertEqual(kms.rotate_key_on_demand(KeyId=arn)["KeyId"], arn)
        kms.rotate_key_on_demand(KeyId=arn)
        self.assertEqual(kms.decrypt(CiphertextBlob=blob)["Plaintext"], b"old")
        first = kms.list_key_rotations(KeyId=arn, Limit=1)
        self.assertEqual((len(first["Rotations"]), first["Truncated"]), (1, True))
        self.assertEqual(first["Rotations"][0]["RotationType"], "ON_DEMAND")
        rest = kms.list_key_rotations(KeyId=arn, Marker=first["NextMarker"])
        self.assertEqual((len(rest["Rotations"]), rest["Truncated"]), (1, False))
        every = kms.list_key_rotations(KeyId=arn, IncludeKeyMaterial="ALL_KEY_MATERIAL")["Rotations"]
        self.assertEqual([r["KeyMaterialState"] for r in every], ["NON_CURRENT", "NON_CURRENT", "CURRENT"])

    def test_tags(self):
        arn = self.key(Tags=[{"TagKey": "a", "TagValue": "1"}])
        kms.tag_resource(KeyId=arn, Tags=[{"TagKey": "b", "TagValue": ""}, {"TagKey": "a", "TagValue": "2"}])
        tags = lambda: [(t["TagKey"], t["TagValue"]) for t in kms.list_resource_tags(KeyId=arn)["Tags"]]
        self.assertEqual(tags(), [("a", "2"), ("b", "")])
        self.assertTrue(kms.list_resource_tags(KeyId=arn, Limit=1)["Truncated"])
        kms.untag_resource(KeyId=arn, TagKeys=["a"])
        self.assertEqual(tags(), [("b", "")])
        self.fails("TagException", "aws:", kms.tag_resource, KeyId=arn, Tags=[{"TagKey": "aws:x", "TagValue": ""}])
        self.fails("LimitExceededException", None, kms.tag_resource, KeyId=arn,
                   Tags=[{"TagKey": str(n), "TagValue": ""} for n in range(50)])
        self.fails("SerializationException", None, kms.tag_resource, KeyId=arn, Tags=[{"TagKey": "x"}])

    def test_policies(self):
        arn = self.key()
        self.assertIn(ROOT_ARN, kms.get_key_policy(KeyId=arn, PolicyName="default")["Policy"])
        self.assertEqual(kms.list_key_policies(KeyId=arn)["PolicyNames"], ["default"])
        policy = '{"Statement": [{"Effect":"Allow","Principal":"*","Action":"kms:*","Resource":"*"}]}'
        kms.put_key_policy(KeyId=arn, Policy=policy)
        self.assertEqual(kms.get_key_policy(KeyId=arn)["Policy"], policy)
        self.fails("MalformedPolicyDocumentException", None, kms.put_key_policy, KeyId=arn, Policy="no")
        self.fails("NotFoundException", None, kms.get_key_policy, KeyId=arn, PolicyName="other")
        self.fails("LimitExceededException", None, kms.put_key_policy, KeyId=arn, Policy='"' + "x" * 32768 + '"')


class Import(Case):
    def test_parameters_and_states(self):
        arn = self.key(Origin="EXTERNAL")
        self.assertEqual(kms.describe_key(KeyId=arn)["KeyMetadata"]["KeyState"], "PendingImport")
        pending = f"{arn} is pending import."
        for call, arguments in [(kms.enable_key, {}), (kms.disable_key, {}), (kms.encrypt, {"Plaintext": b"x"}),
                                (kms.generate_data_key, {"NumberOfBytes": 1})]:
            self.fails("KMSInvalidStateException", pending, call, KeyId=arn, **arguments)
        external = f"{arn} origin is EXTERNAL which is not valid for this operation."
        for call in (kms.enable_key_rotation, kms.disable_key_rotation, kms.get_key_rotation_status,
                     kms.rotate_key_on_demand):
            self.fails("UnsupportedOperationException", external, call, KeyId=arn)
        given = {"KeyId": arn, "WrappingAlgorithm": "RSAES_OAEP_SHA_256", "WrappingKeySpec": "RSA_2048"}
        answer = kms.get_parameters_for_import(**given)
        self.assertEqual(answer["KeyId"], arn)
        self.assertEqual(answer["PublicKey"][:1], b"\x30", "DER")
        self.fails("UnsupportedOperationException", None, kms.get_parameters_for_import,
                   **{**given, "WrappingAlgorithm": "RSAES_OAEP_SHA_1"})
        self.fails("ValidationException", None, kms.get_parameters_for_import,
                   **{**given, "WrappingKeySpec": "RSA_1024"})
        material = {"KeyId": arn, "ImportToken": answer["ImportToken"], "EncryptedKeyMaterial": b"x" * 256}
        self.fails("ValidationException", "A validTo date must be set", kms.import_key_material, **material)
        material["ExpirationModel"] = "KEY_MATERIAL_DOES_NOT_EXPIRE"
        self.fails("InvalidCiphertextException", None, kms.import_key_material, **material)
        self.fails("InvalidImportTokenException", None, kms.import_key_material, **{**material, "ImportToken": b"x"})
        self.assertEqual(kms.delete_imported_key_material(KeyId=arn)["KeyId"], arn)
        own = self.key()
        message = f"{own} origin is AWS_KMS which is not valid for this operation."
        self.fails("UnsupportedOperationException", message, kms.delete_imported_key_material, KeyId=own)
        self.fails("UnsupportedOperationException", message, kms.get_parameters_for_import, **{**given, "KeyId": own})
        self.wrap_and_use(arn, answer)

    def wrap_and_use(self, arn, answer):
        modulus, exponent = rsa_numbers(answer["PublicKey"])
        wrapped = oaep_encrypt(modulus, exponent, b"\7" * 32)
        expires = datetime.datetime.now(datetime.timezone.utc) + datetime.timedelta(days=30)
        done = kms.import_key_material(KeyId=arn, ImportToken=answer["ImportToken"], EncryptedKeyMaterial=wrapped,
                                       ExpirationModel="KEY_MATERIAL_EXPIRES", ValidTo=expires)
        metadata = kms.describe_key(KeyId=arn)["KeyMetadata"]
        self.assertEqual((metadata["KeyState"], metadata["ExpirationModel"]), ("Enabled", "KEY_MATERIAL_EXPIRES"))
        self.assertEqual(metadata["CurrentKeyMaterialId"], done["KeyMaterialId"])
        self.assertLess(abs(metadata["ValidTo"] - expires), datetime.timedelta(seconds=1))
        blob = kms.encrypt(KeyId=arn, Plaintext=b"x")["CiphertextBlob"]
        gone = kms.delete_imported_key_material(KeyId=arn)
        self.assertEqual(gone["KeyMaterialId"], done["KeyMaterialId"])
        self.fails("KMSInvalidStateException", "is pending import.", kms.decrypt, CiphertextBlob=blob)
        other = oaep_encrypt(modulus, exponent, b"\10" * 32)
        again = {"KeyId": arn, "ImportToken": answer["ImportToken"], "ExpirationModel": "KEY_MATERIAL_DOES_NOT_EXPIRE"}
        self.fails("IncorrectKeyMaterialException", None, kms.import_key_material, EncryptedKeyMaterial=other, **again)
        kms.import_key_material(EncryptedKeyMaterial=wrapped, **again)
        self.assertEqual(kms.decrypt(CiphertextBlob=blob)["Plaintext"], b"x")


def rsa_numbers(der):
    """Modulus and exponent of a SubjectPublicKeyInfo."""
    def item(data):
        length, head = data[1], 2
        if length & 0x80:
            head = 2 + (length & 0x7F)
            length = int.from_bytes(data[2:head], "big")
        return data[head:head + length], data[head + length:]
    _, bits = item(item(der)[0])
    modulus, rest = item(item(item(bits)[0][1:])[0])
    return int.from_bytes(modulus, "big"), int.from_bytes(item(rest)[0], "big")


def oaep_encrypt(modulus, exponent, message):
    """RSAES-OAEP of RFC 8017 with SHA-256 and an empty label."""
    import hashlib
    size = (modulus.bit_length() + 7) // 8

    def mask(seed, length):
        blocks = (hashlib.sha256(seed + n.to_bytes(4, "big")).digest() for n in range(length // 32 + 1))
        return b"".join(blocks)[:length]

    def xor(a, b):
        return bytes(x ^ y for x, y in zip(a, b))
    data = hashlib.sha256(b"").digest() + b"\0" * (size - len(message) - 66) + b"\1" + message
    seed = os.urandom(32)
    masked = xor(data, mask(seed, len(data)))
    encoded = b"\0" + xor(seed, mask(masked, 32)) + masked
    return pow(int.from_bytes(encoded, "big"), exponent, modulus).to_bytes(size, "big")


class Forms(Case):
    def test_what_only_looks_after_keys_takes_no_alias(self):
        arn = self.key()
        name = "alias/forms"
        kms.create_alias(AliasName=name, TargetKeyId=arn)
        alias_arn = f"arn:aws:kms:us-east-1:000000000000:{name}"
        refused = "Key Aliases are not supported for this operation."
        grantee = {"GranteePrincipal": HOST_ARN, "Operations": ["Decrypt"]}
        grant = {"GrantId": "a" * 64}
        wrapping = {"WrappingAlgorithm": "RSAES_OAEP_SHA_256", "WrappingKeySpec": "RSA_2048"}
        material = {"ImportToken": b"x", "EncryptedKeyMaterial": b"x", "ExpirationModel": "KEY_MATERIAL_DOES_NOT_EXPIRE"}
        calls = [
            (kms.enable_key, {}), (kms.disable_key, {}), (kms.schedule_key_deletion, {}),
            (kms.cancel_key_deletion, {}), (kms.update_key_description, {"Description": "x"}),
            (kms.list_aliases, {}), (kms.create_grant, grantee), (kms.list_grants, {}),
            (kms.revoke_grant, grant), (kms.retire_grant, grant), (kms.enable_key_rotation, {}),
            (kms.disable_key_rotation, {}), (kms.get_key_rotation_status, {}), (kms.rotate_key_on_demand, {}),
            (kms.list_key_rotations, {}), (kms.get_key_policy, {}), (kms.put_key_policy, {"Policy": "{}"}),
            (kms.list_key_policies, {}), (kms.tag_resource, {"Tags": []}), (kms.untag_resource, {"TagKeys": []}),
            (kms.list_resource_tags, {}), (kms.get_parameters_for_import, wrapping),
            (kms.import_key_material, material), (kms.delete_imported_key_material, {})]
        for call, arguments in calls:
            for named in [name, alias_arn]:
                self.fails("InvalidArnException", refused, call, KeyId=named, **arguments)
        self.assertEqual(kms.describe_key(KeyId=name)["KeyMetadata"]["KeyState"], "Enabled")
        for named in [name, alias_arn]:
            blob = kms.encrypt(KeyId=named, Plaintext=b"x")["CiphertextBlob"]
            self.assertEqual(kms.decrypt(KeyId=named, CiphertextBlob=blob)["Plaintext"], b"x")
            kms.generate_data_key(KeyId=named, NumberOfBytes=1)
            kms.generate_data_key_without_plaintext(KeyId=named, NumberOfBytes=1)
            kms.re_encrypt(CiphertextBlob=blob, SourceKeyId=named, DestinationKeyId=named)

    def test_fields_are_as_long_as_awss(self):
        arn = self.key()
        long = lambda call, **arguments: self.fails("ValidationException", "have length", call, **arguments)
        long(kms.describe_key, KeyId="x" * 2049)
        long(kms.create_key, Description="x" * 8193)
        long(kms.encrypt, KeyId=arn, Plaintext=b"x", EncryptionContext={"key": "x" * 8192})
        long(kms.list_keys, Marker="x" * 1025)
        grant = {"KeyId": arn, "GranteePrincipal": HOST_ARN, "Operations": ["Decrypt"]}
        for kind in ["EncryptionContextEquals", "EncryptionContextSubset"]:
            for pair in [{"k": "x" * 385}, {"x" * 385: "v"}]:
                long(kms.create_grant, Constraints={kind: pair}, **grant)
            kms.create_grant(Constraints={kind: {"x" * 384: "x" * 384}}, **grant)
        long(kms.create_grant, **{**grant, "GranteePrincipal": "x" * 257})


class Grants(Case):
    def test_a_principal_needs_a_grant(self):
        arn = self.key()
        blob = kms.encrypt(KeyId=arn, Plaintext=b"x", EncryptionContext=CONTEXT)["CiphertextBlob"]
        decrypt = {"CiphertextBlob": blob, "EncryptionContext": CONTEXT}
        denied = self.fails("AccessDeniedException", "kms:Decrypt", host.decrypt, KeyId=arn, **decrypt)
        self.assertIn(f"User: {HOST_ARN} is not authorized", denied["Message"])
        self.fails("AccessDeniedException", None, host.decrypt, **decrypt)
        for call, arguments in [
                (host.create_key, {}), (host.list_keys, {}), (host.describe_key, {"KeyId": arn}),
                (host.disable_key, {"KeyId": arn}), (host.list_grants, {"KeyId": arn}), (host.list_aliases, {}),
                (host.encrypt, {"KeyId": arn, "Plaintext": b"x"}), (host.generate_random, {"NumberOfBytes": 1}),
                (host.generate_data_key, {"KeyId": arn, "NumberOfBytes": 1}),
                (host.get_key_policy, {"KeyId": arn}), (host.schedule_key_deletion, {"KeyId": arn}),
                (host.create_grant, {"KeyId": arn, "GranteePrincipal": HOST_ARN, "Operations": ["Decrypt"]})]:
            self.fails("AccessDeniedException", None, call, **arguments)
        grant = kms.create_grant(KeyId=arn, GranteePrincipal=HOST_ARN, RetiringPrincipal=HOST_ARN,
                                 Operations=["Decrypt", "DescribeKey"],
                                 Constraints={"EncryptionContextSubset": CONTEXT})
        tokens = [grant["GrantToken"]]
        self.assertEqual(host.decrypt(GrantTokens=tokens, **decrypt)["Plaintext"], b"x")
        self.assertEqual(host.describe_key(KeyId=arn)["KeyMetadata"]["Arn"], arn)
        other = kms.encrypt(KeyId=arn, Plaintext=b"x", EncryptionContext={"aws:ebs:id": "vol-2"})["CiphertextBlob"]
        self.fails("AccessDeniedException", None, host.decrypt, CiphertextBlob=other,
                   EncryptionContext={"aws:ebs:id": "vol-2"})
        self.fails("InvalidGrantTokenException", None, host.decrypt, GrantTokens=["x"], **decrypt)
        self.fails("ValidationException", None, host.decrypt, GrantTokens=tokens * 11, **decrypt)
        host.retire_grant(GrantToken=tokens[0])
        self.fails("AccessDeniedException", None, host.decrypt, **decrypt)

    def test_grants_are_listed_and_revoked(self):
        arn = self.key()
        named = {"KeyId": arn, "GranteePrincipal": HOST_ARN, "RetiringPrincipal": ROOT_ARN, "Operations": ["Decrypt"],
                 "Name": "n", "Constraints": {"EncryptionContextEquals": CONTEXT}}
        first = kms.create_grant(**named)
        self.assertEqual(kms.create_grant(**named)["GrantId"], first["GrantId"])
        for _ in range(3):
            kms.create_grant(KeyId=arn, GranteePrincipal=HOST_ARN, Operations=["Encrypt"])
        pages = kms.get_paginator("list_grants").paginate(KeyId=arn, PaginationConfig={"PageSize": 2})
        grants = [g for page in pages for g in page["Grants"]]
        self.assertEqual(len(grants), 4)
        mine = next(g for g in grants if g["GrantId"] == first["GrantId"])
        self.assertEqual((mine["Name"], mine["KeyId"], mine["Operations"]), ("n", arn, ["Decrypt"]))
        self.assertEqual(mine["Constraints"], {"EncryptionContextEquals": CONTEXT})
        retirable = kms.list_retirable_grants(RetiringPrincipal=ROOT_ARN)["Grants"]
        self.assertIn(first["GrantId"], [g["GrantId"] for g in retirable])
        only = kms.list_grants(KeyId=arn, GrantId=first["GrantId"])["Grants"]
        self.assertEqual(len(only), 1)
        self.fails("DryRunOperationException", None, kms.revoke_grant, KeyId=arn, GrantId=first["GrantId"], DryRun=True)
        self.fails("DryRunOperationException", None, kms.retire_grant, KeyId=arn, GrantId=first["GrantId"], DryRun=True)
        kms.revoke_grant(KeyId=arn, GrantId=first["GrantId"])
        self.fails("NotFoundException", None, kms.revoke_grant, KeyId=arn, GrantId=first["GrantId"])
        self.fails("InvalidGrantIdException", None, kms.revoke_grant, KeyId=arn, GrantId="x")
        self.fails("ValidationException", None, kms.retire_grant, KeyId=arn)
        self.fails("ValidationException", None, kms.create_grant, KeyId=arn, GranteePrincipal=HOST_ARN,
                   Operations=["Sign"])
        self.fails("InvalidArnException", None, kms.create_grant, KeyId=arn, GranteePrincipal=HOST_ARN + "x",
                   Operations=["Decrypt"])


class Wire(Case):
    def refused(self, name, answer):
        self.assertEqual(answer[0], 400, answer)
        self.assertIn(f'"__type":"{name}"', answer[1])

    def test_signatures(self):
        self.assertEqual(post()[0], 200)
        now = datetime.datetime.now(datetime.timezone.utc)
        for minutes in (-6, 6):
            self.refused("InvalidSignatureException", post(at=now + datetime.timedelta(minutes=minutes)))
        for minutes in (-4, 4):
            self.assertEqual(post(at=now + datetime.timedelta(minutes=minutes))[0], 200)
        self.refused("InvalidSignatureException", post(keys=(ROOT[0], "wrong")))
        self.refused("UnrecognizedClientException", post(keys=("AKIAIOSFODNN7EXAMPLE", "x")))
        self.refused("UnrecognizedClientException", post(keys=(*ROOT, "token")))
        self.refused("InvalidSignatureException", post(region="eu-west-1"))
        self.refused("InvalidSignatureException", post(service="s3"))
        self.refused("InvalidSignatureException", post(change=lambda headers, body: b"{ }"))

        def target(headers, body):
            headers["X-Amz-Target"] = "TrentService.CreateKey"
            return body
        self.refused("InvalidSignatureException", post(change=target))

        def unsigned(headers, body):
            del headers["Authorization"]
            return body
        self.refused("MissingAuthenticationTokenException", post(change=unsigned))
        self.refused("IncompleteSignatureException", post(change=lambda h, b: h.update(Authorization="x") or b))

    def test_requests(self):
        self.refused("UnknownOperationException", post(target="TrentService.Nothing"))
        self.refused("UnknownOperationException", post(target="Other.ListKeys"))
        self.refused("UnknownOperationException", post(method="GET", body=b""))
        self.refused("UnknownOperationException", post(path="/other"))
        for body in (b"", b"[]", b"{", b"\xff", b"null", b'{"Limit":"x"}', b"[" * 5000):
            self.refused("SerializationException", post(body=body))
        self.assertEqual(post(body=b'{"Unknown":1,"Limit":null}')[0], 200)

    def test_bounds(self):
        where = (urlsplit(URL).hostname, urlsplit(URL).port)

        def raw(data):
            with socket.create_connection(where, timeout=LIMIT) as connection:
                try:
                    connection.sendall(data)
                    return connection.recv(100)
                except (BrokenPipeError, ConnectionResetError):
                    return b""
        self.refused("SerializationException", post(body=b'{"a":"' + b"x" * (300 << 10) + b'"}'))
        self.assertNotIn(b" 200 ", raw(b"GET / HTTP/1.1\r\n" + b"a: " + b"x" * (64 << 10) + b"\r\n\r\n"))
        self.assertNotIn(b" 200 ", raw(b"GET / HTTP/1.1\r\n" + b"a: x\r\n" * 200 + b"\r\n"))
        for garbage in (b"\0" * 100 + b"\r\n\r\n", b"\x16\x03\x01\x02\0\1\0\1\xfc\3\3" + os.urandom(200),
                        b"POST / HTTP/1.1\r\nContent-Length: -1\r\n\r\n"):
            self.assertNotIn(b" 200 ", raw(garbage))
        idle = [socket.create_connection(where) for _ in range(100)]
        try:
            self.assertTrue(kms.list_keys(Limit=1)["Keys"])
        finally:
            for connection in idle:
                connection.close()


if __name__ == "__main__":
    kms.create_key()
    unittest.main(verbosity=2, argv=sys.argv[:1])
