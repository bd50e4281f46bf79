/** The agent's work on a control group, in a folder whose files a test writes in the kernel's place. */
import { EventEmitter, once } from 'node:events';
import { chmodSync, mkdtempSync, readdirSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterEach, beforeEach, describe, expect, it } from 'vitest';
import { parseFlatKeyed, parseNestedKeyed, parseValue, readIfThere } from '../../../agent/cgroup-file.ts';
import { Freezer } from '../../../agent/freezer.ts';
import { setLimits } from '../../../agent/limits.ts';
import { OomWatch } from '../../../agent/oom.ts';
import { parseIoStat, readStats } from '../../../agent/stats.ts';

let cgroup: string;
const put = (name: string, content: string) => writeFileSync(join(cgroup, name), content);
const get = (name: string) => readFileSync(join(cgroup, name), 'utf8');
beforeEach(() => {
  cgroup = mkdtempSync(join(tmpdir(), 'kiln-cgroup-'));
});
afterEach(() => rmSync(cgroup, { recursive: true }));

describe('a file of a control group', () => {
  it('that is flat keyed is numbers by their names; other lines are left out', () => {
    expect(parseFlatKeyed('populated 1\nfrozen 0\n')).toEqual({ populated: 1n, frozen: 0n });
    expect(parseFlatKeyed('usage_usec 18446744073709551615\n')).toEqual({ usage_usec: 2n ** 64n - 1n });
    expect(parseFlatKeyed('default 100\nodd\n8:0 50 7\nmax max\n')).toEqual({ default: 100n });
    expect(parseFlatKeyed('')).toEqual({});
  });

  it('of one value is a number, or none for max', () => {
    expect(parseValue('4096\n')).toBe(4096n);
    expect(parseValue('max\n')).toBeUndefined();
    expect(parseValue('')).toBeUndefined();
  });

  it('that is nested keyed has numbers by device', () => {
    expect(parseNestedKeyed('254:0 rbytes=1 wbytes=2\n254:16\n')).toEqual([
      ['254:0', { rbytes: 1n, wbytes: 2n }],
      ['254:16', {}],
    ]);
  });

  it('that is not there is undefined; one that cannot be read is an error', () => {
    expect(readIfThere(join(cgroup, 'memory.peak'))).toBeUndefined();
    expect(() => readIfThere(cgroup)).toThrow('EISDIR');
  });
});

describe('statistics', () => {
  it('are the files as they are, without what is unlimited or missing', () => {
    put('cpu.stat', 'usage_usec 300\nuser_usec 200\nsystem_usec 100\nnr_periods 4\nnr_throttled 1\nthrottled_usec 9\n');
    put('cpu.max', '50000 100000\n');
    put('memory.stat', 'anon 4096\nfile 8192\npgfault 3\n');
    put('memory.events', 'low 0\nhigh 0\nmax 7\noom 2\noom_kill 1\noom_group_kill 0\n');
    put('memory.current', '12288\n');
    put('memory.max', 'max\n');
    put('pids.current', '3\n');
    put('pids.max', '50\n');
    put('io.stat', '254:16 rbytes=1024 wbytes=2048 rios=2 wios=5 dbytes=0 dios=0\n254:0 \n');
    expect(readStats(cgroup)).toEqual({
      cpu: {
        usage_usec: 300n,
        user_usec: 200n,
        system_usec: 100n,
        nr_periods: 4n,
        nr_throttled: 1n,
        throttled_usec: 9n,
      },
      memory: { anon: 4096n, file: 8192n, pgfault: 3n },
      memoryEvents: { low: 0n, high: 0n, max: 7n, oom: 2n, oom_kill: 1n, oom_group_kill: 0n },
      values: { 'memory.current': 12288n, 'pids.current': 3n, 'pids.max': 50n },
      io: [{ major: 254, minor: 16, rbytes: 1024n, wbytes: 2048n, rios: 2n, wios: 5n }],
      cpuQuotaUs: 50_000n,
      cpuPeriodUs: 100_000n,
    });
    put('cpu.max', 'max 100000\n');
    expect(readStats(cgroup)).toMatchObject({ cpuQuotaUs: undefined, cpuPeriodUs: 100_000n });
  });

  it('of a group that is gone are empty', () => {
    expect(readStats(join(cgroup, 'gone'))).toMatchObject({ cpu: {}, values: {}, io: [] });
  });

  it('of disks leave out what has no numbers, or no device', () => {
    expect(parseIoStat('7:0 \nodd rbytes=1\n8:1 rbytes=5\n')).toEqual([
      { major: 8, minor: 1, rbytes: 5n, wbytes: 0n, rios: 0n, wios: 0n },
    ]);
  });
});

describe('the freezer', () => {
  /** Resolves when the freezer has written to cgroup.freeze. */
  beforeEach(() => {
    put('cgroup.freeze', '');
    put('cgroup.events', 'populated 1\nfrozen 0\n');
  });

  it('waits until all are frozen, then settles, and thaws', async () => {
    const freezer = new Freezer('web', cgroup);
    const steps: string[] = [];
    const paused = freezer.pause(async () => void steps.push('settled'));
    expect(get('cgroup.freeze')).toBe('1');
    await expect(freezer.pause(async () => {})).rejects.toThrow('cannot pause container "web": it is pausing');
    expect(() => freezer.resume()).toThrow('cannot resume container "web": it is pausing');
    expect(steps).toEqual([]);
    put('cgroup.events', 'populated 1\nfrozen 1\n');
    await paused;
    expect(steps).toEqual(['settled']);
    await expect(freezer.pause(async () => {})).rejects.toThrow('cannot pause container "web": it is paused');
    freezer.resume();
    expect(get('cgroup.freeze')).toBe('0');
    expect(() => freezer.resume()).toThrow('cannot resume container "web": it is running');
  });

  it('lets the container go on when it does not freeze in time, and can be asked again', async () => {
    const freezer = new Freezer('web', cgroup, 20);
    await expect(freezer.pause(async () => {})).rejects.toThrow(
      'container "web" did not freeze within 0.02 s: a process of it is busy in the kernel',
    );
    expect(get('cgroup.freeze')).toBe('0');
    put('cgroup.events', 'populated 1\nfrozen 1\n');
    await freezer.pause(async () => {});
  });

  it('lets the container go on when what it wrote cannot be flushed', async () => {
    put('cgroup.events', 'populated 1\nfrozen 1\n');
    const freezer = new Freezer('web', cgroup);
    await expect(freezer.pause(() => Promise.reject(new Error('EIO')))).rejects.toThrow('EIO');
    expect(get('cgroup.freeze')).toBe('0');
  });

  it('makes no file where there is no such group', async () => {
    rmSync(join(cgroup, 'cgroup.freeze'));
    await expect(new Freezer('web', cgroup).pause(async () => {})).rejects.toThrow('ENOENT');
    expect(readdirSync(cgroup)).toEqual(['cgroup.events']);
  });
});

describe('the watch for killed processes', () => {
  class Reader extends EventEmitter {
    readonly kills: bigint[] = [];
    readonly tell = (kills: bigint) => {
      this.kills.push(kills);
      this.emit('told');
    };
  }

  it('tells each reader of every growth once, of what was before at once, and no more once disposed', async () => {
    put('memory.events', 'oom 0\noom_kill 0\n');
    using watch = new OomWatch(cgroup);
    const first = new Reader();
    const following = watch.follow(first.tell);
    expect(first.kills).toEqual([]);
    const told = once(first, 'told');
    // The file's own size stays, as the kernel's does: only the value counts.
    put('memory.events', 'oom 1\noom_kill 2\n');
    await told;
    const second = new Reader();
    watch.follow(second.tell);
    expect(second.kills).toEqual([2n]);
    expect(first.kills).toEqual([2n]);
    following[Symbol.dispose]();
    const again = once(second, 'told');
    put('memory.events', 'oom 2\noom_kill 3\n');
    await again;
    expect(second.kills).toEqual([2n, 3n]);
    expect(first.kills).toEqual([2n]);
  });
});

describe('limits', () => {
  it('are all written, in order', async () => {
    put('memory.max', 'max\n');
    put('cpu.max', 'max 100000\n');
    await setLimits(cgroup, [
      { name: 'memory.max', content: '1048576' },
      { name: 'cpu.max', content: '50000 100000' },
    ]);
    expect([get('memory.max'), get('cpu.max')]).toEqual(['1048576\n', '50000 100000\n']);
  });

  it('are as before when one cannot be written, with the reason', async () => {
    put('memory.max', 'max\n');
    const files = [
      { name: 'memory.max', content: '8192' },
      { name: 'io.bfq.weight', content: '50' },
    ];
    await expect(setLimits(cgroup, files)).rejects.toThrow(
      'cannot set io.bfq.weight to "50": the guest\'s kernel has no such limit',
    );
    // The kernel truncates what it shows; a plain file does not.
    expect(get('memory.max').slice(0, 4)).toBe('max\n');
    expect(readdirSync(cgroup)).toEqual(['memory.max']);
  });

  it.runIf(process.getuid?.() !== 0)('that may not be written are refused', async () => {
    put('memory.max', 'max\n');
    chmodSync(join(cgroup, 'memory.max'), 0o400);
    await expect(setLimits(cgroup, [{ name: 'memory.max', content: '1' }])).rejects.toThrow('EACCES');
  });

  it.each(['cgroup.procs', 'cgroup.kill', '../memory.max', 'a/memory.max', 'memory', ''])(
    'are files of a controller: "%s" is refused',
    async (name) => {
      await expect(setLimits(cgroup, [{ name, content: '1' }])).rejects.toThrow(`"${name}" is no file of a limit`);
    },
  );
});
