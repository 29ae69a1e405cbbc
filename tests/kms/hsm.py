"""What boto3 sees of custom key stores, which are tokens of SoftHSM. Started by tests/kms/hsm.rs."""
import os
import sys
import unittest

from server import CONTEXT, Case, client, host, kms

ROOT = (os.environ["ROOT_KEY"], os.environ["ROOT_SECRET"])
ONE, TWO = "cluster-of-token-one", "cluster-of-token-two"
PIN_ONE, PIN_TWO = os.environ["PIN_ONE"], os.environ["PIN_TWO"]


def make(name, cluster, pin):
    return kms.create_custom_key_store(CustomKeyStoreName=name, CloudHsmClusterId=cluster, KeyStorePassword=pin,
                                       TrustAnchorCertificate="-")["CustomKeyStoreId"]


def shown(store):
    (found,) = kms.describe_custom_key_stores(CustomKeyStoreId=store)["CustomKeyStores"]
    return found


def key_in(store, **more):
    return kms.create_key(Origin="AWS_CLOUDHSM", CustomKeyStoreId=store, **more)["KeyMetadata"]


class KeyStores(Case):
    def setUp(self):
        for store in kms.describe_custom_key_stores()["CustomKeyStores"]:
            if store["ConnectionState"] != "DISCONNECTED":
                kms.disconnect_custom_key_store(CustomKeyStoreId=store["CustomKeyStoreId"])

    def test_1_a_key_store_goes_through_its_life(self):
        store = make("one", ONE, PIN_ONE)
        self.assertRegex(store, "^cks-[0-9a-f]{17}$")
        found = shown(store)
        self.assertEqual((found["ConnectionState"], found["CustomKeyStoreName"], found["CloudHsmClusterId"],
                          found["CustomKeyStoreType"]), ("DISCONNECTED", "one", ONE, "AWS_CLOUDHSM"))
        invalid = "CustomKeyStoreInvalidStateException"
        self.fails(invalid, store, key_in, store)
        self.fails(invalid, store, kms.disconnect_custom_key_store, CustomKeyStoreId=store)
        self.fails(invalid, store, kms.generate_random, NumberOfBytes=8, CustomKeyStoreId=store)
        self.fails("CustomKeyStoreNameInUseException", None, make, "one", TWO, PIN_TWO)
        self.fails("CloudHsmClusterInUseException", None, make, "other", ONE, PIN_ONE)
        kms.connect_custom_key_store(CustomKeyStoreId=store)
        kms.connect_custom_key_store(CustomKeyStoreId=store)
        self.assertEqual(shown(store)["ConnectionState"], "CONNECTED")
        self.assertNotIn("ConnectionErrorCode", shown(store))
        self.fails(invalid, store, kms.update_custom_key_store, CustomKeyStoreId=store, NewCustomKeyStoreName="x")
        self.fails(invalid, store, kms.delete_custom_key_store, CustomKeyStoreId=store)
        self.assertEqual(len(kms.generate_random(NumberOfBytes=33, CustomKeyStoreId=store)["Plaintext"]), 33)

        key = key_in(store, Description="d")
        arn = key["Arn"]
        self.assertEqual((key["Origin"], key["CustomKeyStoreId"], key["CloudHsmClusterId"], key["KeyState"],
                          key["Enabled"]), ("AWS_CLOUDHSM", store, ONE, "Enabled", True))
        blob = kms.encrypt(KeyId=arn, Plaintext=b"secret", EncryptionContext=CONTEXT)["CiphertextBlob"]
        for named in ({}, {"KeyId": arn}):
            opened = kms.decrypt(CiphertextBlob=blob, EncryptionContext=CONTEXT, **named)
            self.assertEqual((opened["Plaintext"], opened["KeyId"]), (b"secret", arn))
            self.assertEqual(opened["KeyMaterialId"], key["CurrentKeyMaterialId"])
        for wrong in ({}, {"aws:ebs:id": "vol-2"}, {**CONTEXT, "a": "b"}):
            error = self.fails("InvalidCiphertextException", None, kms.decrypt, CiphertextBlob=blob,
                               EncryptionContext=wrong)
            self.assertEqual(error.get("Message", ""), "")
        made = kms.generate_data_key(KeyId=arn, NumberOfBytes=64, EncryptionContext=CONTEXT)
        self.assertEqual(len(made["CiphertextBlob"]), 141)
        opened = kms.decrypt(CiphertextBlob=made["CiphertextBlob"], EncryptionContext=CONTEXT)
        self.assertEqual(opened["Plaintext"], made["Plaintext"])
        longest = kms.encrypt(KeyId=arn, Plaintext=b"x" * 4096)["CiphertextBlob"]
        self.assertEqual(kms.decrypt(CiphertextBlob=longest)["Plaintext"], b"x" * 4096)
        many = {f"key-{n}": "v" for n in range(700)}
        wide = kms.encrypt(KeyId=arn, Plaintext=b"x", EncryptionContext=many)["CiphertextBlob"]
        self.assertEqual(kms.decrypt(CiphertextBlob=wide, EncryptionContext=many)["Plaintext"], b"x")

        soft = self.key()
        for source, target in ((arn, soft), (soft, arn), (arn, arn)):
            first = kms.encrypt(KeyId=source, Plaintext=b"y", EncryptionContext=CONTEXT)["CiphertextBlob"]
            again = kms.re_encrypt(CiphertextBlob=first, SourceEncryptionContext=CONTEXT, DestinationKeyId=target)
            self.assertEqual((again["SourceKeyId"], again["KeyId"]), (source, target))
            self.assertEqual(kms.decrypt(CiphertextBlob=again["CiphertextBlob"])["Plaintext"], b"y")
        # A blob of one kind is none of the other.
        other = kms.encrypt(KeyId=soft, Plaintext=b"x", EncryptionContext=CONTEXT)["CiphertextBlob"]
        for mine, flipped in ((blob, 1), (other, 2)):
            changed = mine[:4] + bytes([flipped]) + mine[5:]
            self.fails("InvalidCiphertextException", None, kms.decrypt, CiphertextBlob=changed,
                       EncryptionContext=CONTEXT)

        for call in (kms.enable_key_rotation, kms.rotate_key_on_demand, kms.get_key_rotation_status):
            self.fails("UnsupportedOperationException", "origin is AWS_CLOUDHSM", call, KeyId=arn)
        self.fails("UnsupportedOperationException", None, kms.get_parameters_for_import, KeyId=arn,
                   WrappingAlgorithm="RSAES_OAEP_SHA_256", WrappingKeySpec="RSA_2048")
        kms.disable_key(KeyId=arn)
        self.fails("DisabledException", None, kms.decrypt, CiphertextBlob=blob, EncryptionContext=CONTEXT)
        kms.enable_key(KeyId=arn)

        kms.disconnect_custom_key_store(CustomKeyStoreId=store)
        now = kms.describe_key(KeyId=arn)["KeyMetadata"]
        self.assertEqual((now["KeyState"], now["Enabled"]), ("Unavailable", False))
        unavailable = f"{arn} is unavailable."
        for call, arguments in [
                (kms.encrypt, {"KeyId": arn, "Plaintext": b"x"}),
                (kms.decrypt, {"CiphertextBlob": blob, "EncryptionContext": CONTEXT}),
                (kms.generate_data_key, {"KeyId": arn, "NumberOfBytes": 64}),
                (kms.generate_data_key_without_plaintext, {"KeyId": arn, "NumberOfBytes": 64}),
                (kms.re_encrypt, {"CiphertextBlob": other, "SourceEncryptionContext": CONTEXT,
                                  "DestinationKeyId": arn})]:
            self.fails("KMSInvalidStateException", unavailable, call, **arguments)
        # What needs no material can be done.
        kms.disable_key(KeyId=arn)
        kms.enable_key(KeyId=arn)
        kms.update_key_description(KeyId=arn, Description="e")
        kms.create_alias(AliasName="alias/in-a-token", TargetKeyId=arn)
        self.fails("CustomKeyStoreHasCMKsException", None, kms.delete_custom_key_store, CustomKeyStoreId=store)
        kms.connect_custom_key_store(CustomKeyStoreId=store)
        opened = kms.decrypt(CiphertextBlob=blob, EncryptionContext=CONTEXT)
        self.assertEqual(opened["Plaintext"], b"secret")
        kms.schedule_key_deletion(KeyId=arn, PendingWindowInDays=7)
        kms.disconnect_custom_key_store(CustomKeyStoreId=store)
        self.assertEqual(kms.describe_key(KeyId=arn)["KeyMetadata"]["KeyState"], "PendingDeletion")
        self.fails("CustomKeyStoreHasCMKsException", None, kms.delete_custom_key_store, CustomKeyStoreId=store)
        kms.update_custom_key_store(CustomKeyStoreId=store, NewCustomKeyStoreName="first")
        self.assertEqual(shown(store)["CustomKeyStoreName"], "first")
        # Another token does not have its keys.
        self.fails("CloudHsmClusterNotRelatedException", None, kms.update_custom_key_store, CustomKeyStoreId=store,
                   CloudHsmClusterId=TWO, KeyStorePassword=PIN_TWO)

    def test_2_a_connection_that_fails_says_why(self):
        store = make("two", TWO, "not-the-password")
        kms.connect_custom_key_store(CustomKeyStoreId=store)
        found = shown(store)
        self.assertEqual((found["ConnectionState"], found["ConnectionErrorCode"]), ("FAILED", "INVALID_CREDENTIALS"))
        invalid = "CustomKeyStoreInvalidStateException"
        self.fails(invalid, "is FAILED", kms.connect_custom_key_store, CustomKeyStoreId=store)
        self.fails(invalid, "is FAILED", key_in, store)
        kms.disconnect_custom_key_store(CustomKeyStoreId=store)
        kms.update_custom_key_store(CustomKeyStoreId=store, KeyStorePassword=PIN_TWO)
        kms.connect_custom_key_store(CustomKeyStoreId=store)
        self.assertEqual(shown(store)["ConnectionState"], "CONNECTED")
        kms.disconnect_custom_key_store(CustomKeyStoreId=store)
        kms.delete_custom_key_store(CustomKeyStoreId=store)
        self.fails("CustomKeyStoreNotFoundException", store, kms.describe_custom_key_stores, CustomKeyStoreId=store)

    def test_3_what_makes_no_sense_is_refused(self):
        self.fails("CustomKeyStoreNotFoundException", None, kms.connect_custom_key_store, CustomKeyStoreId="cks-0")
        self.fails("CustomKeyStoreNotFoundException", None, kms.disconnect_custom_key_store, CustomKeyStoreId="cks-0")
        self.fails("CustomKeyStoreNotFoundException", None, kms.delete_custom_key_store, CustomKeyStoreId="cks-0")
        self.fails("CustomKeyStoreNotFoundException", None, kms.update_custom_key_store, CustomKeyStoreId="cks-0")
        self.fails("CustomKeyStoreNotFoundException", None, key_in, "cks-0")
        self.fails("CustomKeyStoreNotFoundException", None, kms.describe_custom_key_stores, CustomKeyStoreName="none")
        self.fails("CloudHsmClusterNotFoundException", None, make, "x", "cluster-of-nobody-0", PIN_ONE)
        self.fails("ValidationException", "at 'keyStorePassword'", make, "x", TWO, "short")
        self.fails("ValidationException", "at 'keyStorePassword'", make, "x", TWO, "x" * 33)
        self.fails("ValidationException", "at 'keyStorePassword'", kms.create_custom_key_store, CustomKeyStoreName="x",
                   CloudHsmClusterId=TWO)
        self.fails("ValidationException", "at 'customKeyStoreName'", make, "", TWO, PIN_TWO)
        self.fails("UnsupportedOperationException", None, kms.create_custom_key_store, CustomKeyStoreName="x",
                   CustomKeyStoreType="EXTERNAL_KEY_STORE")
        store = kms.describe_custom_key_stores()["CustomKeyStores"][0]["CustomKeyStoreId"]
        self.fails("ValidationException", "AWS_CLOUDHSM", kms.create_key, CustomKeyStoreId=store)
        self.fails("ValidationException", "AWS_CLOUDHSM", kms.create_key, Origin="AWS_CLOUDHSM")
        self.fails("UnsupportedOperationException", None, key_in, store, MultiRegion=True)
        for call, arguments in [
                (host.create_custom_key_store, {"CustomKeyStoreName": "x", "CloudHsmClusterId": TWO,
                                                "KeyStorePassword": PIN_TWO}),
                (host.describe_custom_key_stores, {}), (host.connect_custom_key_store, {"CustomKeyStoreId": store}),
                (host.disconnect_custom_key_store, {"CustomKeyStoreId": store}),
                (host.update_custom_key_store, {"CustomKeyStoreId": store}),
                (host.delete_custom_key_store, {"CustomKeyStoreId": store})]:
            self.fails("AccessDeniedException", None, call, **arguments)

    def test_4_clients_with_their_own_checks_are_content(self):
        import boto3
        checked = boto3.client("kms", endpoint_url=os.environ["KMS_URL"], region_name="us-east-1",
                               aws_access_key_id=ROOT[0], aws_secret_access_key=ROOT[1])
        store = checked.create_custom_key_store(CustomKeyStoreName="checked", CloudHsmClusterId=TWO,
                                                TrustAnchorCertificate="-", KeyStorePassword=PIN_TWO)
        store = store["CustomKeyStoreId"]
        pages = checked.get_paginator("describe_custom_key_stores").paginate(PaginationConfig={"PageSize": 1})
        self.assertIn(store, [found["CustomKeyStoreId"] for page in pages for found in page["CustomKeyStores"]])
        checked.delete_custom_key_store(CustomKeyStoreId=store)


if __name__ == "__main__":
    unittest.main(verbosity=2, argv=sys.argv[:1])
