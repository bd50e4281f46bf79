import { execFileSync, spawnSync } from 'node:child_process';
import { constants, statSync, writeFileSync } from 'node:fs';
import path from 'node:path';
import { describe, expect, test } from 'vitest';
import { errno, fails } from './errno.ts';
import { useShares } from './share.ts';

const { O_RDWR } = constants;

const hasSetcap = spawnSync('setcap', ['-h']).error === undefined;

describe('a file of a volume', () => {
  const share = useShares();

  test('has extended attributes of users, which can be listed, replaced and removed', async () => {
    const { client, source } = await share();
    writeFileSync(path.join(source, 'file'), '');
    const fid = await client.walk('0/file');
    const large = 'v'.repeat(3000);
    const [CREATE, REPLACE] = [1, 2];
    await client.setxattr('0/file', 'user.one', 'value', CREATE);
    await client.setxattr('0/file', 'user.two', large);
    await client.setxattr('0/file', 'user.empty', '');
    expect((await client.getxattr(fid, 'user.one')).toString()).toBe('value');
    expect((await client.getxattr(fid, 'user.two')).toString()).toBe(large);
    expect(await client.getxattr(fid, 'user.empty')).toHaveLength(0);
    expect((await client.getxattr(fid, '')).toString().split('\0').sort()).toEqual([
      '',
      'user.empty',
      'user.one',
      'user.two',
    ]);
    await fails(client.setxattr('0/file', 'user.one', 'again', CREATE), errno.EEXIST);
    await fails(client.setxattr('0/file', 'user.three', 'none', REPLACE), errno.ENODATA);
    await client.setxattr('0/file', 'user.one', '', REPLACE); // what Linux makes of removexattr(2)
    await fails(client.getxattr(fid, 'user.one'), errno.ENODATA);
    for (const name of ['trusted.one', 'security.one', 'security.selinux', 'security.capability']) {
      await fails(client.setxattr('0/file', name, 'value'), errno.EPERM);
      // By this error the guest's kernel leaves it to the host's to take a file's capabilities away.
      const error = name === 'security.capability' ? errno.EOPNOTSUPP : errno.EPERM;
      await fails(client.setxattr('0/file', name, '', REPLACE), error);
    }
  });

  test.skipIf(!hasSetcap)(
    'shows a program’s capabilities, and takes them away when it is written to (needs setcap)',
    async () => {
      const { client, source } = await share();
      const program = path.join(source, 'program');
      writeFileSync(program, 'program');
      execFileSync('setcap', ['cap_net_raw+ep', program]);
      const fid = await client.open('0/program', O_RDWR);
      expect(await client.getxattr(await client.walk('0/program'), 'security.capability')).toHaveLength(20);
      await client.write(fid, 0, 'another');
      await fails(client.getxattr(await client.walk('0/program'), 'security.capability'), errno.ENODATA);
    },
  );

  test('has POSIX ACLs, which getfacl(1) of the host would show, too', async () => {
    const { client, source } = await share();
    writeFileSync(path.join(source, 'file'), '');
    // linux/posix_acl_xattr.h: version 2, then tag, permissions and id of each entry.
    const entries = [
      [1, 6, -1],
      [2, 4, 1000],
      [4, 4, -1],
      [0x10, 4, -1],
      [0x20, 0, -1],
    ] as const;
    const acl = Buffer.alloc(4 + 8 * entries.length);
    acl.writeUInt32LE(2);
    for (const [i, [tag, permissions, id]] of entries.entries()) {
      acl.writeUInt16LE(tag, 4 + 8 * i);
      acl.writeUInt16LE(permissions, 6 + 8 * i);
      acl.writeInt32LE(id, 8 + 8 * i);
    }
    await client.setxattr('0/file', 'system.posix_acl_access', acl);
    expect(await client.getxattr(await client.walk('0/file'), 'system.posix_acl_access')).toEqual(acl);
    expect(statSync(path.join(source, 'file')).mode & 0o777).toBe(0o640);
  });
});
