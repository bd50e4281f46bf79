/**
 * The same wrong inputs for runc and for kiln: exit codes are the same, and so are the words that callers look for. What is
 * meant to differ stands here and in docs/oci-runtime.md. No virtual machine is started; runc starts nothing either.
 */
import { mkdirSync, mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { defaultSpec } from '../../src/oci/default-spec.ts';
import { distBin, runcBin } from '../support/paths.ts';
import { run } from '../support/spawn.ts';

interface Answer {
  readonly code: number;
  /** What the one line on stderr says. */
  readonly message: string;
  readonly stdout: string;
}

describe('wrong inputs', () => {
  let dir: string;
  beforeAll(() => {
    dir = mkdtempSync(join(tmpdir(), 'kiln-errors-'));
    const bundle = (name: string, config?: string) => {
      mkdirSync(join(dir, name, 'rootfs'), { recursive: true });
      if (config !== undefined) writeFileSync(join(dir, name, 'config.json'), config);
    };
    const { process } = defaultSpec;
    bundle('plain', JSON.stringify({ ...defaultSpec, process: { ...process, terminal: false } }));
    bundle('terminal', JSON.stringify(defaultSpec));
    bundle('empty');
    bundle('broken', '{nope');
    bundle('wrong', JSON.stringify({ ...defaultSpec, process: { ...process, args: 5 } }));
    for (const program of ['runc', 'kiln']) {
      mkdirSync(join(dir, program, 'corrupt'), { recursive: true });
      writeFileSync(join(dir, program, 'corrupt', 'state.json'), '{');
    }
  });
  afterAll(() => rmSync(dir, { recursive: true, force: true }));

  const ask = async (program: 'runc' | 'kiln', args: readonly string[]): Promise<Answer> => {
    const path = join(program === 'runc' ? runcBin() : distBin, program);
    const env = { PATH: process.env.PATH, KILN_STATE_DIR: join(dir, 'state'), KILN_CACHE_DIR: join(dir, 'cache') };
    const all = ['--root', join(dir, program), ...args.map((word) => word.replace('DIR', dir))];
    const { code, stdout, stderr } = await run(path, all, { env, cwd: dir, stdin: '' });
    const said = /^time="[^"]*Z" level=error msg=(".*")$/m.exec(stderr)?.[1];
    const message = (said === undefined ? stderr.trim() : (JSON.parse(said) as string)).replaceAll(
      /\S*\/runc:/g,
      'runc:',
    );
    return { code, stdout: stdout.toString(), message: message.replaceAll(/\b(runc|kiln)\b/g, 'RUNTIME') };
  };
  const both = (args: readonly string[]) => Promise.all([ask('runc', args), ask('kiln', args)]);

  const long = 'x'.repeat(300);
  const create = ['create', '--bundle', 'DIR/plain'];
  const terminal = ['--bundle', 'DIR/terminal', 'c1'];

  it.each<[string, string[]]>([
    ...['state', 'start', 'kill', 'delete', 'pause', 'resume', 'ps', 'update', 'events'].map(
      (verb): [string, string[]] => [`an unknown id for ${verb}`, [verb, 'nobody']],
    ),
    ['an unknown id for exec', ['exec', 'nobody', 'true']],
    ['an unknown id for exec without a command', ['exec', 'nobody']],
    ['a bad signal for an unknown id', ['kill', 'nobody', 'NOSUCH']],
    ['a bad format for an unknown id', ['ps', '-f', 'yaml', 'nobody']],
    ['a bad interval for an unknown id', ['events', '--interval', '0s', 'nobody']],
    ['a bad limit for an unknown id', ['update', '--memory', 'zz', 'nobody']],
    ['delete --force of an unknown id', ['delete', '--force', 'nobody']],
    ['an empty id', ['state', '']],
    ['an empty id for create', [...create, '']],
    ['no id for state', ['state']],
    ['two ids for state', ['state', 'a', 'b']],
    ['no id for kill', ['kill']],
    ['no id for exec', ['exec']],
    ['no id for ps', ['ps']],
    ['an id for list', ['list', 'x']],
    ['an unknown flag', ['start', '--nosuch', 'x']],
    ['an unknown flag of the program', ['--nosuch']],
    ['a console socket without a terminal', [...create, '--console-socket', 'DIR/none', 'c1']],
    [
      'a console socket without a terminal for run',
      ['run', '-d', '--bundle', 'DIR/plain', '--console-socket', 'DIR/none', 'c1'],
    ],
    ['a terminal without a console socket for create', ['create', ...terminal]],
    ['a terminal without a console socket for run --detach', ['run', '--detach', ...terminal]],
    ['an unknown format of the log', ['--log-format', 'yaml', 'state', 'nobody']],
    ['a config.json that is there', ['spec', '--bundle', 'DIR/plain']],
  ])('%s: the same exit code and words', async (_what, args) => {
    const [runc, kiln] = await both(args);
    expect({ code: kiln.code, message: kiln.message }).toEqual({ code: runc.code, message: runc.message });
  });

  it.each<[string, string[], RegExp]>([
    ['an id with a slash', ['state', 'a/b'], /^invalid container ID format: "a\/b" \(/],
    ['an id with a slash for create', [...create, 'a/b'], /^RUNTIME create failed: invalid container ID format: /],
    ['an id with a slash for delete --force', ['delete', '--force', 'a/b'], /^invalid container ID format: /],
    ['an id that climbs', ['state', '..'], /^invalid container ID format: /],
    // runc: "lstat …: file name too long".
    ['an id of 300 characters', ['state', long], /^invalid container ID format: "x{80}" \(it has 1 to 255 /],
    ['an id of 300 characters for create', [...create, long], /^RUNTIME create failed: invalid container ID format: /],
    // runc: "JSON specification file config.json not found", "invalid character …", "cannot unmarshal …".
    [
      'no config.json',
      ['create', '-b', 'DIR/empty', 'c1'],
      /^RUNTIME create failed: .*\/empty\/config\.json: no such file$/,
    ],
    ['no bundle', ['create', '-b', 'DIR/none', 'c1'], /^RUNTIME create failed: .*\/none\/config\.json: no such file$/],
    ['a config.json that is no JSON', ['create', '-b', 'DIR/broken', 'c1'], /broken\/config\.json: not valid JSON: /],
    [
      'a value of another type',
      ['create', '-b', 'DIR/wrong', 'c1'],
      /wrong\/config\.json: process\.args: expected array/,
    ],
    [
      'a terminal that is none',
      ['run', ...terminal],
      /^RUNTIME run failed: process\.terminal is true, but standard input is no/,
    ],
    ['an unknown format of list', ['list', '-f', 'yaml'], /^invalid format option: yaml/],
    ['a number that is none', [...create, '--preserve-fds', 'x', 'c1'], /^invalid value "x" for flag -preserve-fds: /],
    ['an unknown verb', ['nosuch'], /^unknown command 'nosuch'/],
    ['a state that is damaged', ['state', 'corrupt'], /corrupt\/state\.json is not the state of a container \(remove /],
    ['a log in a folder that is not there', ['--log', 'DIR/none/l', 'state', 'x'], /^cannot write the log .*: ENOENT$/],
    // runc has another order, or another reason.
    ['a checkpoint', ['checkpoint', 'nobody'], /^checkpoint is not supported: /],
    ['a restore', ['restore', 'nobody'], /^restore is not supported: /],
  ])('%s: the same exit code, and words of our own that say more', async (_what, args, words) => {
    const [runc, kiln] = await both(args);
    expect(kiln.code).toBe(runc.code);
    expect(kiln.message).toMatch(words);
  });

  it.each([['state'], ['start'], ['list', 'x'], ['start', '--nosuch', 'x']])(
    '%j shows how it is meant, on stdout',
    async (...args) => {
      for (const answer of await both(args)) expect(answer.stdout).toMatch(/^Incorrect Usage[.:]/);
    },
  );

  it('no arguments show the help', async () => {
    const [runc, kiln] = [await run(join(runcBin(), 'runc'), []), await run(join(distBin, 'kiln'), [])];
    expect(kiln.code).toBe(runc.code);
    expect(kiln.stdout.toString()).toContain('Usage: kiln');
  });

  it('list tells of a state that is damaged, and goes on', async () => {
    const [runc, kiln] = await both(['list']);
    expect([kiln.code, kiln.stdout]).toEqual([runc.code, runc.stdout]);
    for (const { message } of [runc, kiln]) expect(message).toMatch(/^load container corrupt: /);
  });

  it('delete --force removes a state that is damaged, which runc does not', async () => {
    const [runc, kiln] = await both(['delete', '--force', 'corrupt']);
    expect([runc.code, kiln.code]).toEqual([1, 0]);
    expect((await ask('kiln', ['state', 'corrupt'])).message).toBe('container does not exist');
  });

  it('a root that cannot be is an error of create alone', async () => {
    const [runc, kiln] = [runcBin(), distBin].map((folder, index) => join(folder, ['runc', 'kiln'][index]!));
    const args = (verb: string[]) => ['--root', '/proc/nobody', ...verb];
    const env = { PATH: process.env.PATH, KILN_STATE_DIR: join(dir, 'state'), KILN_CACHE_DIR: join(dir, 'cache') };
    const made = ['create', '--bundle', join(dir, 'plain'), 'c1'];
    for (const program of [runc!, kiln!]) {
      const result = await run(program, args(made), { env, stdin: '' });
      expect(result).toMatchObject({ code: 1, stderr: expect.stringContaining('/proc/nobody') });
    }
    expect(await run(kiln!, args(['list', '-q']), { env })).toMatchObject({ code: 0, stdout: Buffer.from('') });
  });

  it.each(['text', 'json'])('the log has the error as %s, and stderr the bare message', async (format) => {
    const logs = await Promise.all(
      (['runc', 'kiln'] as const).map(async (program) => {
        const log = join(dir, `${program}.${format}`);
        const { message } = await ask(program, ['--log', log, '--log-format', format, 'state', 'nobody']);
        expect(message).toBe('container does not exist');
        return readFileSync(log, 'utf8').replaceAll(/\d{4}-[\dT:-]+Z/g, 'TIME');
      }),
    );
    expect(logs[1]).toBe(logs[0]);
  });

  it('the log has wrong usage, too', async () => {
    const log = join(dir, 'usage.json');
    await ask('kiln', ['--log', log, '--log-format', 'json', 'start']);
    expect(JSON.parse(readFileSync(log, 'utf8'))).toMatchObject({
      level: 'error',
      msg: 'kiln: "start" requires exactly 1 argument(s)',
    });
  });
});
