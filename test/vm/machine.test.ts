import { spawnSync } from 'node:child_process';
import { existsSync, readdirSync, readFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { setTimeout as sleep } from 'node:timers/promises';
import { expect, test } from 'vitest';
import { describeVm, inVm, startVm } from '../support/vm.js';

const MiB = 1024; // in the kernel's kB

/** Processes whose command line has a word. */
function processesWith(word: string): string[] {
  return readdirSync('/proc').filter((pid) => {
    try {
      return /^\d+$/.test(pid) && readFileSync(`/proc/${pid}/cmdline`, 'latin1').split('\0').includes(word);
    } catch {
      return false; // gone meanwhile
    }
  });
}

function vm(...words: string[]) {
  return spawnSync(process.execPath, ['scripts/vm.mjs', ...words], { encoding: 'utf8' });
}

describeVm('a virtual machine', () => {
  test('with cgroup v2 and swap: output and exit code come out, and what was asked for is there', async () => {
    const options = ['--memory', '768MiB', '--swap', '256MiB', '--cpus', '1', '--env', 'GREETING=two  words'];
    const { code, stdout, stderr } = await inVm(
      options,
      `
      node -e '
        const { readFileSync, statSync } = require("node:fs");
        const read = (file) => readFileSync(file, "utf8").trim();
        console.log(JSON.stringify({
          greeting: process.env.GREETING,
          folder: process.cwd(),
          memory: Number(/MemTotal: +([0-9]+)/.exec(read("/proc/meminfo"))[1]),
          swap: Number(/SwapTotal: +([0-9]+)/.exec(read("/proc/meminfo"))[1]),
          processors: require("node:os").cpus().length,
          enabled: read("/sys/fs/cgroup/cgroup.subtree_control").split(" ").sort(),
          stalls: read("/proc/pressure/memory").split("\\n").length,
          capabilities: /CapEff:\\s*(\\S+)/.exec(read("/proc/self/status"))[1],
          now: Date.now(),
        }));'
      printf 'a\\r\\nb\\0\\xff' | base64
      printf 'a\\r\\nb'
      echo no >/etc/reprieve-test-vm; test -e /etc/reprieve-test-vm
      mkdir /sys/fs/cgroup/reprieve-test; echo 1 >/sys/fs/cgroup/reprieve-test/memory.max
      echo told >/dev/stderr
      exit 7`,
    );
    const [facts, ...rest] = stdout.split('\n');
    const { memory, now, ...exact } = JSON.parse(facts ?? '');
    expect(exact).toEqual({
      greeting: 'two  words',
      folder: process.cwd(),
      swap: 256 * MiB - 4,
      processors: 1,
      enabled: ['cpu', 'memory', 'pids'],
      stalls: 2,
      capabilities: '000001ffffffffff',
    });
    expect(memory).toBeGreaterThan(680 * MiB);
    expect(memory).toBeLessThan(768 * MiB);
    expect(Math.abs(Date.now() - now)).toBeLessThan(120_000);
    expect(rest.join('\n')).toBe(`${Buffer.from('a\r\nb\0\xff', 'latin1').toString('base64')}\na\r\nb`);
    expect(stderr).toBe('told\n');
    expect(code).toBe(7);
    expect(existsSync('/etc/reprieve-test-vm')).toBe(false);
  });

  test('with cgroup v1: doctor finds what it needs, and the demo kills the right job', async () => {
    const { code, stdout } = await inVm(
      ['--cgroup', 'v1'],
      // What the demo ends with also depends on how much the others get done in a given time: emulated, that may be nothing.
      'ls /sys/fs/cgroup; node dist/cli/main.js doctor; node dist/cli/main.js demo || true',
    );
    expect(stdout).toMatch(/^freezer\nmemory\npids\nLinux/);
    expect(stdout).toMatch(/^ok +memory cgroups +cgroup v1 at \/sys\/fs\/cgroup\/memory$/m);
    expect(stdout).toMatch(/^ok +PSI triggers +any window$/m);
    expect(stdout).toMatch(/^ok +oom_score_adj +can be lowered$/m);
    expect(stdout).toMatch(/ ran out of memory .*: cleared\.$/m);
    expect(stdout).toMatch(/ policy +batch is dead: /);
    for (const job of ['web', 'database']) {
      expect(stdout).toMatch(new RegExp(`^  ${job}: alive, .* 0 wrong results$`, 'm'));
    }
    expect(code).toBe(0);
  });

  test('without the memory controller and without PSI; a panic is told, with the log of the kernel', async () => {
    const { code, stdout, stderr } = await inVm(
      ['--cgroup', 'none', '--psi', 'off'],
      `
      stat -fc %T /sys/fs/cgroup; cat /sys/fs/cgroup/cgroup.subtree_control; grep -w ^memory /proc/cgroups
      test ! -e /proc/pressure/memory
      echo c >/proc/sysrq-trigger`,
    );
    expect(stdout).toMatch(/^cgroup2fs\ncpu pids\nmemory\s+0\s+\d+\s+0\n$/);
    expect(stderr).toMatch(/sysrq: Trigger a crash/);
    expect(stderr).toMatch(/\nvirtual machine: Kernel panic - not syncing: sysrq triggered crash\n$/);
    expect(code).toBe(125);
  });

  test('with systemd as the first process, whose units can be changed and loaded anew', async () => {
    const { code, stdout } = await inVm(
      ['--systemd'],
      `
      cat /proc/1/comm; systemctl is-system-running --wait; systemd-detect-virt --container || true
      systemd-run --quiet --unit reprieve-test sleep 1000
      systemctl set-property --runtime reprieve-test.service MemoryMax=64M
      cat /sys/fs/cgroup/system.slice/reprieve-test.service/memory.max
      echo max >/sys/fs/cgroup/system.slice/reprieve-test.service/memory.max
      systemctl daemon-reload
      cat /sys/fs/cgroup/system.slice/reprieve-test.service/memory.max
      systemctl --failed --quiet`,
    );
    expect(stdout).toBe(`systemd\nrunning\nnone\n${64 * 2 ** 20}\n${64 * 2 ** 20}\n`);
    expect(code).toBe(0);
  });

  test('out of memory beyond help is told', async () => {
    const { code, stderr } = await inVm(
      ['--memory', '256MiB'],
      `
      mount -o remount,size=100% /dev/shm
      echo -1000 >/proc/self/oom_score_adj
      head -c 1G /dev/zero >/dev/shm/full`,
    );
    expect(stderr).toMatch(/\nvirtual machine: Kernel panic - not syncing: System is deadlocked on memory\n$/);
    expect(code).toBe(125);
  });

  test('that takes too long is killed', () => {
    const { status, stdout, stderr } = vm('--timeout', '1', '--', 'sleep', '100');
    expect(stderr).toMatch(/virtual machine: it did not end within 1 s and was killed\n$/);
    expect(stdout).toBe('');
    expect(status).toBe(124);
  });

  test.each([
    ['SIGTERM', 143],
    ['SIGKILL', null],
  ] as const)('ends with its script on %s, and leaves nothing', async (signal, expected) => {
    const before = processesWith('qemu-system-x86_64');
    const files = () => readdirSync(tmpdir()).filter((name) => name.startsWith('reprieve-vm-'));
    const { child, told } = startVm(['--swap', '64MiB'], ['sleep', '100']);
    const running = () => processesWith('qemu-system-x86_64').filter((pid) => !before.includes(pid));
    while (running().length === 0) await sleep(20);
    child.kill(signal);
    expect((await told).code).toBe(expected);
    await expect.poll(running).toEqual([]);
    expect(files()).toEqual([]);
  });

  test('is refused where what is asked for is not understood', () => {
    const refused = (...words: string[]) => {
      const { status, stdout, stderr } = vm(...words);
      expect({ status, stdout }).toEqual({ status: 125, stdout: '' });
      return stderr;
    };
    expect(refused('--cgroup', 'v3', '--', 'true')).toMatch(/Expected --cgroup to be v1, v2 or none, got "v3"/);
    expect(refused('--memory', '100KiB', '--', 'true')).toMatch(/Expected --memory to be whole MiB, 128 or more/);
    expect(refused('--env', 'HOME', '--', 'true')).toMatch(/Expected --env to be NAME=VALUE, got "HOME"/);
    expect(refused('--kernel', '/etc/passwd', '--', 'true')).toMatch(/\/etc\/passwd is no kernel image/);
    expect(refused('true')).toMatch(/Unexpected argument 'true'/);
    expect(refused()).toMatch(/Expected the command to be a program and its arguments after --/);
  });
});
