import { constants, writeFileSync } from 'node:fs';
import path from 'node:path';
import { describe, expect, test } from 'vitest';
import { isLocked, lockFile } from '../../support/file-locks.ts';
import { encode, lockStatus, lockType, message, type NinePError, T } from '../../support/ninep.ts';
import { errno, fails } from './errno.ts';
import { useShares } from './share.ts';

const { O_RDONLY, O_RDWR } = constants;

const whole = { start: 0, length: 0 };

describe('locks on a volume', () => {
  const share = useShares();

  async function shareWithFile() {
    const made = await share();
    const file = path.join(made.source, 'file');
    writeFileSync(file, 'x'.repeat(100));
    return { ...made, file };
  }

  test('are of ranges, and the host sees them', async () => {
    const { client, file } = await shareWithFile();
    const fid = await client.open('0/file', O_RDWR);
    expect(await client.lock(fid, lockType.write, { start: 10, length: 10 })).toBe(lockStatus.success);
    expect(isLocked(file, { start: 0, length: 10 })).toBe(false);
    expect(isLocked(file, { start: 10, length: 10 })).toBe(true);
    expect(isLocked(file, { start: 19, length: 10 })).toBe(true);
    expect(await client.lock(fid, lockType.unlock, { start: 10, length: 10 })).toBe(lockStatus.success);
    expect(isLocked(file, whole)).toBe(false);
  });

  test('of the host are seen by the guest', async () => {
    const { client, file } = await shareWithFile();
    const fid = await client.open('0/file', O_RDWR);
    const host = lockFile(file, { start: 10, length: 10 });
    expect(await client.lock(fid, lockType.read, { start: 15, length: 1 })).toBe(lockStatus.blocked);
    expect(await client.lock(fid, lockType.write, { start: 50, length: 1 })).toBe(lockStatus.success);
    expect(await client.getlock(fid, lockType.write, { start: 0, length: 20 })).toBe(lockType.write);
    host?.[Symbol.dispose]();
    expect(await client.getlock(fid, lockType.write, { start: 0, length: 20 })).toBe(lockType.unlock);
    expect(await client.lock(fid, lockType.read, { start: 15, length: 1 })).toBe(lockStatus.success);
  });

  test('of the whole file count for flock and for fcntl on the host', async () => {
    const { client, file } = await shareWithFile();
    const fid = await client.open('0/file', O_RDWR);
    expect(await client.lock(fid, lockType.write)).toBe(lockStatus.success);
    expect(isLocked(file, 'flock')).toBe(true);
    expect(isLocked(file, whole)).toBe(true);
    expect(await client.lock(fid, lockType.unlock)).toBe(lockStatus.success);
    expect(isLocked(file, 'flock')).toBe(false);
    const host = lockFile(file, 'flock');
    expect(await client.lock(fid, lockType.write)).toBe(lockStatus.blocked);
    host?.[Symbol.dispose]();
    expect(await client.lock(fid, lockType.write)).toBe(lockStatus.success);
  });

  test('belong to a process and not to what it has opened', async () => {
    const { client, file } = await shareWithFile();
    const [first, second] = [await client.open('0/file', O_RDWR), await client.open('0/file', O_RDWR)];
    expect(await client.lock(first, lockType.write, { length: 10 })).toBe(lockStatus.success);
    expect(await client.lock(second, lockType.write, { length: 10 })).toBe(lockStatus.success);
    expect(await client.lock(second, lockType.unlock, { length: 10 })).toBe(lockStatus.success);
    expect(isLocked(file, { start: 0, length: 10 })).toBe(false);
    for (const process of [1, 2]) {
      expect(await client.lock(first, lockType.read, { length: 10, process })).toBe(lockStatus.success);
    }
    await client.lock(first, lockType.unlock, { length: 10, process: 1 });
    expect(isLocked(file, { start: 0, length: 10 })).toBe(true);
  });

  test('are gone when the file is closed', async () => {
    const { client, file } = await shareWithFile();
    const fid = await client.open('0/file', O_RDWR);
    await client.lock(fid, lockType.write);
    await client.clunk(fid);
    expect(isLocked(file, 'flock')).toBe(false);
    expect(isLocked(file, whole)).toBe(false);
  });

  test('can be waited for, while other requests are answered', async () => {
    const { client, file } = await shareWithFile();
    const fid = await client.open('0/file', O_RDWR);
    const host = lockFile(file, whole);
    const lock = client.lock(fid, lockType.write, { wait: true });
    expect(await client.read(fid, 0, 1)).toHaveLength(1);
    host?.[Symbol.dispose]();
    expect(await lock).toBe(lockStatus.success);
  });

  test('are no longer waited for by who gave up, and the answer comes before that to the flush', async () => {
    const { client, file } = await shareWithFile();
    const fid = await client.open('0/file', O_RDWR);
    const host = lockFile(file, whole);
    const tag = client.nextTag();
    const order: string[] = [];
    const lock = client.lock(fid, lockType.write, { wait: true, tag }).catch((error: NinePError) => {
      order.push('lock');
      expect(error.errno).toBe(errno.EINTR);
    });
    await client.getattr(fid);
    await client.flush(tag).then(() => order.push('flush'));
    await lock;
    expect(order).toEqual(['lock', 'flush']);
    host?.[Symbol.dispose]();
    expect(isLocked(file, whole)).toBe(false);
  });

  test('are not held up by flushes that wait for each other', async () => {
    const { client, file } = await shareWithFile();
    const fid = await client.open('0/file', O_RDWR);
    const host = lockFile(file, whole);
    const lock = client.lock(fid, lockType.write, { wait: true });
    await client.getattr(fid);
    // It waits for the fid, and so for the lock, and no signal ends that.
    const [stuck, flush] = [60_000, 60_001];
    await client.send(
      message(
        T.lopen,
        stuck,
        encode([
          [4, fid],
          [4, O_RDONLY],
        ]),
      ),
    );
    const first = client.call(T.flush, [[2, stuck]], flush);
    await client.send(message(T.flush, stuck, encode([[2, flush]])));
    await client.getattr(0);
    host?.[Symbol.dispose]();
    await lock;
    await first;
  });

  test('are told to be asked for again beyond those that can be waited for, and the server goes on', async () => {
    const { client, file } = await shareWithFile();
    const fid = await client.open('0/file', O_RDWR);
    const host = lockFile(file, whole);
    const answers = Array.from({ length: 40 }, (_, process) =>
      client.lock(fid, lockType.read, { wait: true, process }),
    );
    expect(await Promise.any(answers)).toBe(lockStatus.blocked);
    expect(await client.read(fid, 0, 1)).toHaveLength(1);
    host?.[Symbol.dispose]();
    const all = await Promise.all(answers);
    expect(all.filter((status) => status === lockStatus.success).length).toBeGreaterThanOrEqual(32);
  });

  test('need a file that is open, and on a read-only volume only flock’s can be for writing', async () => {
    const { client } = await share((folder) => {
      writeFileSync(path.join(folder, 'ro'), 'text');
      return [{ source: path.join(folder, 'ro'), readOnly: 'mount' }];
    });
    await fails(client.lock(await client.walk('1'), lockType.read), errno.EBADF);
    const fid = await client.open('1', O_RDONLY);
    expect(await client.lock(fid, lockType.write)).toBe(lockStatus.success);
    expect(await client.lock(fid, lockType.read, { start: 1, length: 1 })).toBe(lockStatus.success);
    expect(await client.lock(fid, lockType.write, { start: 1, length: 1 })).toBe(lockStatus.failed);
  });
});
