import { mkdtempSync, readdirSync, readlinkSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import path from 'node:path';
import { afterEach, beforeEach, expect, test } from 'vitest';
import { claimUid, releaseUid, uidsOf } from '../../../../src/vmm/firecracker/jail-uids.ts';

let claims: string;
beforeEach(() => {
  claims = path.join(mkdtempSync(path.join(tmpdir(), 'kiln-u')), 'claims');
});
afterEach(() => rmSync(path.dirname(claims), { recursive: true }));

const range = { first: 1_900_000_000, count: 1000 };

test('a directory always gets the same user id while that is free, and the claim says whose it is', () => {
  const uid = claimUid(range, '/run/kiln/c/one', claims);
  expect(uid).toBeGreaterThanOrEqual(range.first);
  expect(uid).toBeLessThan(range.first + range.count);
  expect(readlinkSync(path.join(claims, String(uid)))).toBe('/run/kiln/c/one');
  releaseUid(uid, claims);
  expect(readdirSync(claims)).toEqual([]);
  expect(claimUid(range, '/run/kiln/c/one', claims)).toBe(uid);
});

test('no two directories get the same one, up to the last', () => {
  const few = { first: 5, count: 3 };
  const uids = ['/a', '/b', '/c'].map((directory) => claimUid(few, directory, claims));
  expect(uids.toSorted()).toEqual([5, 6, 7]);
  expect(() => claimUid(few, '/d', claims)).toThrow(
    expect.objectContaining({
      code: 'resource-exhausted',
      message: 'every user id for jailed VMs is in use: 5 to 7',
      hint: `raise vm.jail_uids in the config file; ${claims} shows what has which`,
    }),
  );
  releaseUid(6, claims);
  expect(claimUid(few, '/d', claims)).toBe(6);
});

test('what a directory has is found again, and nothing where nothing was claimed', () => {
  expect(uidsOf('/a', claims)).toEqual([]);
  const uid = claimUid(range, '/a', claims);
  claimUid(range, '/b', claims);
  expect(uidsOf('/a', claims)).toEqual([uid]);
  // Of another user's range, or twice.
  const second = claimUid(range, '/a', claims);
  expect(uidsOf('/a', claims).toSorted()).toEqual([uid, second].toSorted());
});
