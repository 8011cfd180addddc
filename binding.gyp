{
  'targets': [
    {
      'target_name': 'reprieve',
      'sources': ['<!@(ls native/core/*.cc native/addon/*.cc)'],
      'include_dirs': [
        'native',
        '<!(node -p "require(\'node-addon-api\').include_dir")',
      ],
      'defines': [
        'NAPI_VERSION=9',
        'NAPI_DISABLE_CPP_EXCEPTIONS',
        'NODE_API_SWALLOW_UNTHROWABLE_EXCEPTIONS',
      ],
      # node's own common.gypi says which standard its headers want; ours is later.
      'cflags_cc!': ['-std=gnu++17'],
      'cflags_cc': ['-std=c++20', '-fno-exceptions', '-fno-rtti', '-fvisibility=hidden'],
      'cflags!': ['-O3', '-Wno-unused-parameter'],
      'cflags': ['-O2', '-Wall', '-Wextra'],
    },
    {
      'target_name': 'reprieve-workload',
      'type': 'executable',
      'sources': ['<!@(ls native/workload/*.cc)'],
      # A plain program: nothing of node's is needed to run it, or to build it.
      'include_dirs!': ['<(node_root_dir)/include/node', '<(node_root_dir)/src', '<(node_root_dir)/deps/uv/include'],
      'cflags_cc!': ['-std=gnu++17'],
      'cflags_cc': ['-std=c++20', '-fno-exceptions', '-fno-rtti'],
      'cflags!': ['-O3', '-Wno-unused-parameter', '-pthread'],
      'cflags': ['-O2', '-Wall', '-Wextra'],
      'ldflags!': ['-rdynamic', '-pthread'],
      'ldflags': ['-static-libstdc++', '-static-libgcc'],
    },
    {
      'target_name': 'reprieve-guard',
      'type': 'executable',
      'sources': ['<!@(ls native/guard/*.cc)', 'native/core/control_file.cc', 'native/core/directory.cc',
                  'native/core/pidfd.cc', 'native/core/process.cc'],
      'include_dirs': ['native'],
      'include_dirs!': ['<(node_root_dir)/include/node', '<(node_root_dir)/src', '<(node_root_dir)/deps/uv/include'],
      'cflags_cc!': ['-std=gnu++17'],
      'cflags_cc': ['-std=c++20', '-fno-exceptions', '-fno-rtti'],
      'cflags!': ['-O3', '-Wno-unused-parameter', '-pthread'],
      # Every function a section of its own: what the guard does not use of the core is left out, and it stays small.
      'cflags': ['-O2', '-Wall', '-Wextra', '-ffunction-sections', '-fdata-sections'],
      'ldflags!': ['-rdynamic', '-pthread'],
      'ldflags': ['-static', '-Wl,--gc-sections'],
    },
  ],
}
