import { spawn, spawnSync } from 'node:child_process';
import { once } from 'node:events';
import { closeSync, fstatSync, mkdtempSync, readFileSync, readlinkSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import path from 'node:path';
import { describe, expect, test } from 'vitest';
import { NetworkNamespace } from '../../../src/sys/netns.ts';
import { closeTap, deleteTap, openTap } from '../../../src/sys/tap.ts';

const here = () => readlinkSync('/proc/thread-self/ns/net');

/** Names of the interfaces in the namespace of this thread. */
function interfaces(): string[] {
  const lines = readFileSync('/proc/thread-self/net/dev', 'utf8').trim().split('\n').slice(2);
  return lines.map((line) => line.split(':')[0]!.trim());
}

describe('a network namespace', () => {
  test('is new, with nothing in it but loopback, and this thread is back where it was', () => {
    const before = here();
    using namespace = NetworkNamespace.create();
    expect(here()).toBe(before);
    expect(namespace.identity).toMatch(/^net:\[\d+\]$/);
    expect(namespace.identity).not.toBe(before);
    expect(namespace.run(interfaces)).toEqual(['lo']);
    expect(namespace.run(here)).toBe(namespace.identity);
    expect(here()).toBe(before);
  });

  test('is left also when the action throws, or goes into another one itself', () => {
    const before = here();
    using outer = NetworkNamespace.create();
    using inner = NetworkNamespace.create();
    const seen: string[] = [];
    const fail = () => {
      seen.push(inner.run(here), here());
      throw new Error('as planned');
    };
    expect(() => outer.run(fail)).toThrow('as planned');
    expect(seen).toEqual([inner.identity, outer.identity]);
    expect(here()).toBe(before);
  });

  test('is where a program runs that is started in there, and lives as long as it', async () => {
    const namespace = NetworkNamespace.create();
    const { identity } = namespace;
    const child = namespace.run(() => spawn('sleep', ['60'], { stdio: 'ignore' }));
    try {
      await once(child, 'spawn');
      namespace[Symbol.dispose]();
      namespace[Symbol.dispose]();
      using again = NetworkNamespace.open(`/proc/${child.pid}/ns/net`);
      expect(again.identity).toBe(identity);
      expect(again.identity).not.toBe(here());
      expect(again.run(interfaces)).toEqual(['lo']);
    } finally {
      child.kill('SIGKILL');
    }
  });

  test('is not what any file stands for, which leaves this thread where it was', () => {
    const directory = mkdtempSync(path.join(tmpdir(), 'kiln-netns-'));
    try {
      const file = path.join(directory, 'file');
      writeFileSync(file, '');
      const before = here();
      using none = NetworkNamespace.open(file);
      expect(() => none.run(here)).toThrow(/EINVAL: .*setns/);
      expect(() => NetworkNamespace.open(path.join(directory, 'nothing'))).toThrow('ENOENT');
      expect(here()).toBe(before);
    } finally {
      rmSync(directory, { recursive: true });
    }
  });
});

describe('a tap device', () => {
  test('is made in the namespace of this thread and goes with its descriptor', () => {
    using namespace = NetworkNamespace.create();
    const fd = namespace.run(() => openTap('ktap'));
    expect(interfaces()).not.toContain('ktap');
    expect(namespace.run(interfaces)).toContain('ktap');
    expect(fstatSync(fd).isCharacterDevice()).toBe(true);
    // No program that is started meanwhile gets it.
    expect(spawnSync('ls', ['-l', '/proc/self/fd']).stdout.toString()).not.toContain('/dev/net/tun');
    closeSync(fd);
    expect(namespace.run(interfaces)).toEqual(['lo']);
  });

  test('goes behind the back of whoever closes it, however many there are', async () => {
    using namespace = NetworkNamespace.create();
    const fds = namespace.run(() => Array.from({ length: 7 }, (_, index) => openTap(`ktap${index}`)));
    expect(namespace.run(interfaces)).toHaveLength(8);
    fds.forEach(closeTap);
    await expect.poll(() => namespace.run(interfaces)).toEqual(['lo']);
    // And when none was waiting any more.
    closeTap(namespace.run(() => openTap('ktap')));
    await expect.poll(() => namespace.run(interfaces)).toEqual(['lo']);
  });

  test('that is persistent stays until it is deleted, and is opened again by its name', async () => {
    using namespace = NetworkNamespace.create();
    namespace.run(() => {
      closeSync(openTap('ktap', { persistent: true, owner: 12_345 }));
      expect(interfaces()).toContain('ktap');
      expect(ownerOf('ktap')).toBe('12345');
      closeSync(openTap('ktap'));
      expect(interfaces()).toContain('ktap');
      deleteTap('ktap');
    });
    await expect.poll(() => namespace.run(interfaces)).toEqual(['lo']);
  });

  test('refuses a name in use, and one that is none', () => {
    using namespace = NetworkNamespace.create();
    namespace.run(() => {
      const fd = openTap('ktap');
      expect(() => openTap('ktap')).toThrow(/EBUSY: .*'ktap'/);
      closeSync(fd);
      expect(() => openTap('sixteen-letters!')).toThrow('is no interface');
      expect(() => openTap('')).toThrow('is no interface');
      expect(() => openTap('a/b')).toThrow('EINVAL');
    });
  });
});

/** Read where the file system is mounted anew, since /sys shows the interfaces of the namespace it was mounted in. */
function ownerOf(name: string): string {
  const script = `mount -t sysfs none /sys && cat /sys/class/net/${name}/owner`;
  return spawnSync('unshare', ['-m', 'sh', '-c', script]).stdout.toString().trim();
}
