/** What the host does with a name that the guest's kernel holds a fid of, because somebody there uses the file. */
import { constants, mkdirSync, readFileSync, renameSync, rmSync, writeFileSync } from 'node:fs';
import path from 'node:path';
import { describe, expect, test } from 'vitest';
import { T } from '../../support/ninep.ts';
import { errno, fails } from './errno.ts';
import { type Share, useShares } from './share.ts';

const { O_RDONLY } = constants;

describe('the fid of a name', () => {
  const share = useShares();

  /** As Linux's client opens: a copy of the name's fid. */
  const openCopy = async ({ client }: Share, fid: number) => {
    const copy = client.newFid();
    await client.call(T.walk, [
      [4, fid],
      [4, copy],
      [2, 0],
    ]);
    await client.lopen(copy, O_RDONLY);
    return copy;
  };
  const textOf = async ({ client }: Share, fid: number) => (await client.read(fid, 0, 100)).toString();

  test('stands for the file that the host has put there, and an open one for the old', async () => {
    const shared = await share();
    const at = (name: string) => path.join(shared.source, name);
    writeFileSync(at('f'), 'old');
    const fid = await shared.client.walk('0/f');
    const open = await openCopy(shared, fid);
    writeFileSync(at('new'), 'the new one');
    renameSync(at('new'), at('f'));
    expect(await textOf(shared, await openCopy(shared, fid))).toBe('the new one');
    expect((await shared.client.getattr(fid)).size).toBe(11);
    expect(await textOf(shared, open)).toBe('old');
  });

  test('cannot be opened any more when the host has removed it, and still tells its attributes', async () => {
    const shared = await share();
    writeFileSync(path.join(shared.source, 'f'), 'old');
    const fid = await shared.client.walk('0/f');
    rmSync(path.join(shared.source, 'f'));
    await fails(openCopy(shared, fid), errno.ENOENT);
    expect((await shared.client.getattr(fid)).size).toBe(3);
    writeFileSync(path.join(shared.source, 'f'), 'again');
    expect(await textOf(shared, await openCopy(shared, fid))).toBe('again');
  });

  test('keeps a program whole whose pages the guest may have', async () => {
    const shared = await share();
    writeFileSync(path.join(shared.source, 'program'), '\x7fELF one');
    const fid = await shared.client.walk('0/program');
    writeFileSync(path.join(shared.source, 'new'), '\x7fELF two');
    renameSync(path.join(shared.source, 'new'), path.join(shared.source, 'program'));
    expect(await textOf(shared, await openCopy(shared, fid))).toBe('\x7fELF one');
    expect(await textOf(shared, await shared.client.open('0/program', O_RDONLY))).toBe('\x7fELF two');
  });

  test('of a directory leads into the one that is there now', async () => {
    const shared = await share();
    mkdirSync(path.join(shared.source, 'd'));
    const fid = await shared.client.walk('0/d');
    renameSync(path.join(shared.source, 'd'), path.join(shared.source, 'd.old'));
    mkdirSync(path.join(shared.source, 'd'));
    writeFileSync(path.join(shared.source, 'd/x'), 'x');
    expect(await textOf(shared, await shared.client.open('x', O_RDONLY, fid))).toBe('x');
    await shared.client.create('made', { from: fid });
    expect(readFileSync(path.join(shared.source, 'd/made'), 'utf8')).toBe('');
  });

  test('is the file that it is after the guest itself has removed or replaced it', async () => {
    const shared = await share();
    const { client, source } = shared;
    for (const name of ['removed', 'replaced', 'moved', 'other']) writeFileSync(path.join(source, name), name);
    const [removed, replaced, moved] = [
      await client.walk('0/removed'),
      await client.walk('0/replaced'),
      await client.walk('0/moved'),
    ];
    await client.unlink('0/removed');
    await client.rename('0/other', '0/replaced');
    await client.rename('0/moved', '0/elsewhere');
    writeFileSync(path.join(source, 'removed'), 'another');
    writeFileSync(path.join(source, 'moved'), 'another');
    expect(await textOf(shared, await openCopy(shared, removed))).toBe('removed');
    expect(await textOf(shared, await openCopy(shared, replaced))).toBe('replaced');
    expect(await textOf(shared, await openCopy(shared, moved))).toBe('moved');
    // It is followed to its new name.
    writeFileSync(path.join(source, 'new'), 'changed');
    renameSync(path.join(source, 'new'), path.join(source, 'elsewhere'));
    expect(await textOf(shared, await openCopy(shared, moved))).toBe('changed');
  });
});
