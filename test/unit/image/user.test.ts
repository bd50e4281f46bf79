import { mkdirSync, mkdtempSync, rmSync, symlinkSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterEach, beforeEach, describe, expect, it } from 'vitest';
import { userOf } from '../../../src/image/user.ts';
import { errorOf } from '../oci/specs.ts';

describe('the user of an image', () => {
  let root: string;
  beforeEach(() => {
    root = mkdtempSync(join(tmpdir(), 'kiln-user-'));
    mkdirSync(join(root, 'etc'));
    writeFileSync(join(root, 'etc/passwd'), 'root:x:0:0::/:\nkate:x:1234:5678:Kate:/home:/bin/sh\n');
    writeFileSync(join(root, 'etc/group'), 'root:x:0:\nstaff:x:5678:\nextra:x:777:tom,kate\n');
  });
  afterEach(() => rmSync(root, { recursive: true }));

  it.each([
    ['', { uid: 0, gid: 0, additionalGids: [] }],
    ['kate', { uid: 1234, gid: 5678, additionalGids: [777] }],
    ['1234', { uid: 1234, gid: 5678, additionalGids: [777] }],
    ['99', { uid: 99, gid: 0, additionalGids: [] }],
    ['kate:extra', { uid: 1234, gid: 777, additionalGids: [] }],
    ['99:100', { uid: 99, gid: 100, additionalGids: [] }],
  ])('"%s" is found in its lists', (text, user) => {
    expect(userOf(root, text)).toEqual(user);
  });

  it.each([
    ['tom', 'the image wants to run as the user "tom", which its /etc/passwd does not have'],
    ['kate:tea', 'the image wants to run as the group "tea", which its /etc/group does not have'],
    ['4294967295', 'the image wants to run as the user "4294967295", which its /etc/passwd does not have'],
  ])('"%s" is refused', (text, message) => {
    expect(errorOf(() => userOf(root, text)).message).toBe(message);
  });

  it('is never looked up in the lists of the host', () => {
    rmSync(join(root, 'etc'), { recursive: true });
    symlinkSync('/etc', join(root, 'etc'));
    expect(() => userOf(root, 'daemon')).toThrow(/too many symbolic links/);
    rmSync(join(root, 'etc'));
    mkdirSync(join(root, 'etc'));
    // In a container it leads to itself.
    symlinkSync('../../../../../../etc/passwd', join(root, 'etc/passwd'));
    expect(() => userOf(root, 'daemon')).toThrow(/cannot read \/etc\/passwd of the image: ELOOP/);
    rmSync(join(root, 'etc/passwd'));
    symlinkSync('../../../../../../../etc/group', join(root, 'etc/passwd'));
    expect(() => userOf(root, 'daemon')).toThrow(/does not have/);
    rmSync(join(root, 'etc/passwd'));
    mkdirSync(join(root, 'etc/passwd'));
    expect(() => userOf(root, 'daemon')).toThrow(/does not have/);
  });

  it('is found through links in the image', () => {
    mkdirSync(join(root, 'usr'));
    writeFileSync(join(root, 'usr/users'), 'tom:x:5:6::/:\n');
    rmSync(join(root, 'etc/passwd'));
    symlinkSync('/usr/users', join(root, 'etc/passwd'));
    expect(userOf(root, 'tom')).toMatchObject({ uid: 5, gid: 6 });
  });
});
