"""Multi-Region keys as boto3 sees them, at the KMS servers of two regions.

Started by tests/kms/regions.rs with the URLs of both servers, their certificates, and the access keys of their root
principals in the environment.
"""
import datetime
import os
import sys
import time
import unittest

import boto3
import botocore.config
from botocore.exceptions import ClientError
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import padding

LIMIT = float(os.environ["SEALBLK_TEST_LIMIT"])
HOME, FAR = "us-east-1", "eu-west-1"
CONTEXT = {"aws:ebs:id": "vol-1"}


def client(which, region):
    config = botocore.config.Config(retries={"total_max_attempts": 1}, connect_timeout=LIMIT, read_timeout=LIMIT)
    return boto3.client("kms", endpoint_url=os.environ[f"{which}_URL"], region_name=region, config=config,
                        aws_access_key_id=os.environ[f"{which}_KEY"], verify=os.environ[f"{which}_CA"],
                        aws_secret_access_key=os.environ[f"{which}_SECRET"])


home, far = client("HOME", HOME), client("FAR", FAR)


def arn(region, key):
    return f"arn:aws:kms:{region}:000000000000:key/{key}"


def state(kms, key):
    return kms.describe_key(KeyId=key)["KeyMetadata"]


def wait_until(what):
    end = time.monotonic() + LIMIT
    while not what():
        if time.monotonic() > end:
            raise AssertionError("it did not come to be")
        time.sleep(0.05)


class Case(unittest.TestCase):
    def fails(self, name, call, **kwargs):
        with self.assertRaises(ClientError) as raised:
            call(**kwargs)
        self.assertEqual(raised.exception.response["Error"]["Code"], name, raised.exception)

    def key(self):
        return home.create_key(MultiRegion=True)["KeyMetadata"]["KeyId"]

    def pair(self):
        key = self.key()
        home.replicate_key(KeyId=key, ReplicaRegion=FAR)
        return key


class Replicas(Case):
    def test_a_key_in_two_regions(self):
        made = home.create_key(MultiRegion=True, Description="near")["KeyMetadata"]
        key = made["KeyId"]
        self.assertRegex(key, "^mrk-[0-9a-f]{32}$")
        self.assertEqual(made["MultiRegionConfiguration"], {
            "MultiRegionKeyType": "PRIMARY", "PrimaryKey": {"Arn": arn(HOME, key), "Region": HOME}, "ReplicaKeys": []})
        answer = home.replicate_key(KeyId=key, ReplicaRegion=FAR, Description="far",
                                    Tags=[{"TagKey": "t", "TagValue": "v"}])
        replica = answer["ReplicaKeyMetadata"]
        self.assertEqual((replica["Arn"], replica["Description"]), (arn(FAR, key), "far"))
        self.assertEqual(answer["ReplicaTags"], [{"TagKey": "t", "TagValue": "v"}])
        self.assertEqual(replica["MultiRegionConfiguration"]["MultiRegionKeyType"], "REPLICA")
        related = {"PrimaryKey": {"Arn": arn(HOME, key), "Region": HOME},
                   "ReplicaKeys": [{"Arn": arn(FAR, key), "Region": FAR}]}
        for kms, kind in [(home, "PRIMARY"), (far, "REPLICA")]:
            shown = state(kms, key)
            self.assertTrue(shown["MultiRegion"])
            self.assertEqual(shown["MultiRegionConfiguration"], {"MultiRegionKeyType": kind, **related})
        for one, other, region in [(home, far, FAR), (far, home, HOME)]:
            blob = one.encrypt(KeyId=key, Plaintext=b"x", EncryptionContext=CONTEXT)["CiphertextBlob"]
            opened = other.decrypt(CiphertextBlob=blob, EncryptionContext=CONTEXT)
            self.assertEqual((opened["Plaintext"], opened["KeyId"]), (b"x", arn(region, key)))
            self.fails("InvalidCiphertextException", other.decrypt, CiphertextBlob=blob)
            # As a copy of a snapshot does it.
            again = other.re_encrypt(CiphertextBlob=blob, SourceKeyId=key, SourceEncryptionContext=CONTEXT,
                                     DestinationKeyId=key, DestinationEncryptionContext={"aws:ebs:id": "snap-1"})
            self.assertEqual((again["SourceKeyId"], again["KeyId"]), (arn(region, key), arn(region, key)))
        self.assertEqual(far.list_resource_tags(KeyId=key)["Tags"], [{"TagKey": "t", "TagValue": "v"}])
        self.assertEqual(home.list_resource_tags(KeyId=key)["Tags"], [])

    def test_what_is_refused(self):
        single = home.create_key()["KeyMetadata"]
        self.assertFalse(single["MultiRegion"])
        self.assertNotIn("MultiRegionConfiguration", single)
        self.fails("UnsupportedOperationException", home.replicate_key, KeyId=single["KeyId"], ReplicaRegion=FAR)
        key = self.pair()
        self.fails("AlreadyExistsException", home.replicate_key, KeyId=key, ReplicaRegion=FAR)
        self.fails("ValidationException", home.replicate_key, KeyId=key, ReplicaRegion="ap-south-1")
        self.fails("ValidationException", home.update_primary_region, KeyId=key, PrimaryRegion="ap-south-1")
        self.fails("UnsupportedOperationException", far.replicate_key, KeyId=key, ReplicaRegion=HOME)
        self.fails("UnsupportedOperationException", far.rotate_key_on_demand, KeyId=key)
        self.fails("UnsupportedOperationException", far.enable_key_rotation, KeyId=key)
        other = self.key()
        self.fails("NotFoundException", home.update_primary_region, KeyId=other, PrimaryRegion=FAR)
        self.fails("NotFoundException", far.describe_key, KeyId=other)
        home.disable_key(KeyId=other)
        self.fails("DisabledException", home.replicate_key, KeyId=other, ReplicaRegion=FAR)
        home.schedule_key_deletion(KeyId=other, PendingWindowInDays=7)
        self.fails("KMSInvalidStateException", home.replicate_key, KeyId=other, ReplicaRegion=FAR)
        # What the other region refuses has not begun.
        fresh = self.key()
        self.fails("TagException", home.replicate_key, KeyId=fresh, ReplicaRegion=FAR,
                   Tags=[{"TagKey": "aws:x", "TagValue": ""}])
        self.assertEqual(state(home, fresh)["MultiRegionConfiguration"]["ReplicaKeys"], [])
        self.assertEqual(home.schedule_key_deletion(KeyId=fresh)["KeyState"], "PendingDeletion")

    def test_rotation_comes_to_the_replica_by_itself(self):
        key = self.pair()
        material = lambda kms: state(kms, key)["CurrentKeyMaterialId"]
        first = material(home)
        self.assertEqual(material(far), first)
        home.rotate_key_on_demand(KeyId=key)
        wait_until(lambda: material(home) != first and material(far) == material(home))
        blob = far.encrypt(KeyId=key, Plaintext=b"new")["CiphertextBlob"]
        self.assertEqual(home.decrypt(CiphertextBlob=blob)["Plaintext"], b"new")
        home.enable_key_rotation(KeyId=key, RotationPeriodInDays=90)
        wait_until(lambda: far.get_key_rotation_status(KeyId=key)["KeyRotationEnabled"])
        self.assertEqual(far.get_key_rotation_status(KeyId=key)["RotationPeriodInDays"], 90)

    def test_the_primary_region_moves(self):
        key = self.pair()
        far.disable_key(KeyId=key)
        self.fails("DisabledException", home.update_primary_region, KeyId=key, PrimaryRegion=FAR)
        self.assertEqual(state(home, key)["KeyState"], "Enabled")
        far.enable_key(KeyId=key)
        home.update_primary_region(KeyId=key, PrimaryRegion=FAR)
        for kms, kind in [(home, "REPLICA"), (far, "PRIMARY")]:
            shown = state(kms, key)
            self.assertEqual((shown["KeyState"], shown["MultiRegionConfiguration"]), ("Enabled", {
                "MultiRegionKeyType": kind, "PrimaryKey": {"Arn": arn(FAR, key), "Region": FAR},
                "ReplicaKeys": [{"Arn": arn(HOME, key), "Region": HOME}]}))
        self.fails("UnsupportedOperationException", home.update_primary_region, KeyId=key, PrimaryRegion=FAR)
        far.rotate_key_on_demand(KeyId=key)
        wait_until(lambda: len(home.list_key_rotations(KeyId=key)["Rotations"]) == 1)

    def test_a_primary_key_waits_for_its_replicas(self):
        key = self.pair()
        dying = home.schedule_key_deletion(KeyId=key, PendingWindowInDays=7)
        self.assertEqual(dying["KeyState"], "PendingReplicaDeletion")
        self.assertNotIn("DeletionDate", dying)
        self.assertEqual(state(home, key)["PendingDeletionWindowInDays"], 7)
        self.fails("KMSInvalidStateException", home.encrypt, KeyId=key, Plaintext=b"x")
        far.encrypt(KeyId=key, Plaintext=b"x")
        self.assertEqual(far.schedule_key_deletion(KeyId=key, PendingWindowInDays=7)["KeyState"], "PendingDeletion")
        home.cancel_key_deletion(KeyId=key)
        self.assertEqual(state(home, key)["KeyState"], "Disabled")


class Imported(Case):
    """Material that is imported into each region by itself."""

    def give(self, kms, key, material, **expires):
        given = kms.get_parameters_for_import(KeyId=key, WrappingAlgorithm="RSAES_OAEP_SHA_256",
                                              WrappingKeySpec="RSA_2048")
        public = serialization.load_der_public_key(given["PublicKey"])
        oaep = padding.OAEP(padding.MGF1(hashes.SHA256()), hashes.SHA256(), None)
        expires = expires or {"ExpirationModel": "KEY_MATERIAL_DOES_NOT_EXPIRE"}
        return kms.import_key_material(KeyId=key, ImportToken=given["ImportToken"],
                                       EncryptedKeyMaterial=public.encrypt(material, oaep), **expires)

    def test_the_same_material_is_imported_into_each_region(self):
        made = home.create_key(MultiRegion=True, Origin="EXTERNAL")["KeyMetadata"]
        key = made["KeyId"]
        self.assertEqual((made["KeyState"], made["MultiRegion"]), ("PendingImport", True))
        self.assertRegex(key, "^mrk-[0-9a-f]{32}$")
        self.fails("KMSInvalidStateException", home.update_primary_region, KeyId=key, PrimaryRegion=FAR)
        one, two = os.urandom(32), os.urandom(32)
        first = self.give(home, key, one)
        replica = home.replicate_key(KeyId=key, ReplicaRegion=FAR)["ReplicaKeyMetadata"]
        self.assertEqual((replica["KeyState"], replica["Origin"]), ("PendingImport", "EXTERNAL"))
        self.fails("KMSInvalidStateException", far.encrypt, KeyId=key, Plaintext=b"x")
        with self.assertRaises(ClientError) as raised:
            self.give(far, key, two)
        self.assertEqual(raised.exception.response["Error"]["Code"], "IncorrectKeyMaterialException")
        until = datetime.datetime.now(datetime.timezone.utc) + datetime.timedelta(days=3)
        second = self.give(far, key, one, ExpirationModel="KEY_MATERIAL_EXPIRES", ValidTo=until)
        self.assertEqual(first["KeyMaterialId"], second["KeyMaterialId"])
        # When it is forgotten is each region's own.
        self.assertEqual(state(far, key)["ExpirationModel"], "KEY_MATERIAL_EXPIRES")
        self.assertEqual(state(home, key)["ExpirationModel"], "KEY_MATERIAL_DOES_NOT_EXPIRE")
        self.assertNotIn("ValidTo", state(home, key))
        for here, there in [(home, far), (far, home)]:
            blob = here.encrypt(KeyId=key, Plaintext=b"x", EncryptionContext=CONTEXT)["CiphertextBlob"]
            self.assertEqual(there.decrypt(CiphertextBlob=blob, EncryptionContext=CONTEXT)["Plaintext"], b"x")
        far.delete_imported_key_material(KeyId=key)
        self.assertEqual((state(far, key)["KeyState"], state(home, key)["KeyState"]), ("PendingImport", "Enabled"))
        self.assertEqual(home.decrypt(CiphertextBlob=blob, EncryptionContext=CONTEXT)["Plaintext"], b"x")
        self.fails("KMSInvalidStateException", far.decrypt, CiphertextBlob=blob, EncryptionContext=CONTEXT)
        self.give(far, key, one)
        self.assertEqual(far.decrypt(CiphertextBlob=blob, EncryptionContext=CONTEXT)["Plaintext"], b"x")
        self.fails("UnsupportedOperationException", home.rotate_key_on_demand, KeyId=key)
        home.update_primary_region(KeyId=key, PrimaryRegion=FAR)
        self.assertEqual(state(far, key)["MultiRegionConfiguration"]["MultiRegionKeyType"], "PRIMARY")

    def test_a_replica_hears_of_the_material_and_takes_none_before(self):
        key = home.create_key(MultiRegion=True, Origin="EXTERNAL")["KeyMetadata"]["KeyId"]
        home.replicate_key(KeyId=key, ReplicaRegion=FAR)
        material = os.urandom(32)
        with self.assertRaises(ClientError) as raised:
            self.give(far, key, material)
        self.assertEqual(raised.exception.response["Error"]["Code"], "IncorrectKeyMaterialException")
        self.give(home, key, material)

        def taken():
            try:
                self.give(far, key, material)
                return True
            except ClientError as e:
                self.assertEqual(e.response["Error"]["Code"], "IncorrectKeyMaterialException")
                return False

        wait_until(taken)
        self.assertEqual(state(far, key)["KeyState"], "Enabled")


if __name__ == "__main__":
    unittest.main(argv=sys.argv[:1])
